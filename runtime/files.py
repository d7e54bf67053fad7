"""Files that are opened without trust in their directory: no link is followed, and nothing but a regular file is used.

Others may write to the directory, too. A link would lead a write elsewhere, and a pipe or a device would never end.
"""

import contextlib
import errno
import functools
import grp
import json
import os
import pwd
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from config.errors import OptionError, naming


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


def require_readable(option: str, path: Path, pattern: str = "*") -> None:
    """Refuse a path, or one of those below it that match, which this user may not read. Raises OptionError.

    Libraries say of such a file that it does not exist, or leave it out. A path that does not exist is not refused.
    """
    for each in (path, *path.glob(pattern)):
        with contextlib.suppress(FileNotFoundError), naming(option, each):
            if not os.access(each, os.R_OK):
                os.close(os.open(each, os.O_RDONLY | os.O_NONBLOCK))


def replace_text(path: Path, text: str) -> None:
    """Write a text file as `replace_file` does."""
    replace_file(path, text.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one rename: readers see the old content or the new one, and a link is replaced."""
    beside = path.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    try:
        with open(beside, "xb") as file:  # x never opens what stands there already
            file.write(content)
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


@functools.cache  # a warning comes once
def require_trusted(path: Path, cache: Path) -> None:
    """Refuse `path`, the directory `cache` or one in it, if any user can change it; warn if some other users can.

    In a directory with the sticky bit, such as /tmp, all users may create names, but each changes only its own. So
    nothing in it is used that belongs to another user. Root and this user are trusted.
    """
    if path != cache and not cache.stat().st_mode & 0o077:
        return  # only its owner comes there
    status, place, open_to_all = path.stat(), f"data_cache_dir {cache}", cache.stat().st_mode & stat.S_IWOTH
    files = [file.lstat() for file in path.rglob("*")] if path != cache and path.is_dir() else []
    for mode in (each.st_mode for each in (status, *files) if not stat.S_ISLNK(each.st_mode)):
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OptionError(
                f"{place}: any user can change {path}, and so what is trained on\n"
                f"run chmod -R o-w {path}, or pass another --data_cache_dir"
            )
    owners = {each.st_uid for each in (status, path.lstat(), *files)} - {0, os.geteuid()}
    names = ", ".join(sorted(_name(pwd.getpwuid, owner) for owner in owners))
    if owners and path != cache and open_to_all:
        raise OptionError(
            f"{place}: all users can write there, and {path} belongs to {names}\npass a --data_cache_dir that is yours"
        )
    if owners:
        _warn(f"{place}: {path} belongs to {names}, who can change what is trained on")
    elif path == cache and status.st_mode & stat.S_IWGRP:
        owner, group = _name(pwd.getpwuid, status.st_uid), _name(grp.getgrgid, status.st_gid)
        if owner != group:  # many systems give each user a group of the same name
            _warn(f"{place}: belongs to {owner}, and all of group {group} can change what is trained on")


def _warn(text: str) -> None:
    """Print a warning, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def _name(look_up: Callable[[int], Sequence[Any]], number: int) -> str:
    """The name of a user or group, or its number if it has none here."""
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)
