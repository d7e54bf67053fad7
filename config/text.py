"""Small files of text, such as files of options, and JSON. They may come from anybody."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

MEBIBYTES = 4  # of a file of options; those of published models and trainers have a few KiB


def read_text(path: Path) -> str:
    """The text of a small file, in UTF-8 with or without BOM.

    Raises OSError, also for a pipe or device, which may have no end. Raises ValueError for bytes that are no UTF-8, and
    for a large file.
    """
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with open(path, "rb") as file:
        raw = file.read(MEBIBYTES << 20)
        if file.read(1):
            raise ValueError(f"it has more than {MEBIBYTES} MiB")
    return raw.decode("utf-8-sig")


def load_json(text: str | bytes, **hooks: Any) -> Any:
    """The value of a JSON text, as json.loads reads it. Raises ValueError, also for too many brackets in each other."""
    try:
        return json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("it has too many brackets in each other") from error
