"""Files that are opened without trust in their directory: no link is followed, and nothing but a regular file is used.

Others may write to the directory, too. A link would lead a write elsewhere, and a pipe or a device would never end.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def regular_file(path: str, flags: int) -> int:
    """An opener for `open`: the descriptor of a regular file. Raises OSError for a link, a pipe, a device.

    Only the last name of the path may not be a link.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, which is not followed", path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one rename: readers see the old content or the new one, and a link is replaced."""
    beside = path.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    try:
        with open(beside, "x") as file:  # x never opens what stands there already
            file.write(text)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path, most: int) -> Any:
    """The JSON value of a file of at most `most` bytes. Raises OSError, or ValueError for anything else.

    Refused, too: a name that comes twice in an object, and values nested deeper than Python can read.
    """
    with open(path, "rb", opener=regular_file) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return json.loads(content.decode(), object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name comes twice in an object")
    return values
