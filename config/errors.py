"""The exception for a mistake of the user, or for a disk that cannot be written."""

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST = 2000  # characters of a line
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
BROKEN = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN)  # a disk, a network file system, or FUSE fails
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a full quota, and a limit on the size of files


class OptionError(ValueError):
    """A mistake of the user. Its text names the option, the value and the remedy in at most three lines.

    The text may quote a file or a value, so control characters, which could write over a terminal, are escaped. If a
    quoted value has lines of its own, they are joined.
    """

    def __init__(self, text: str) -> None:
        *lines, last = text.strip().split("\n")
        if len(lines) > 2:
            lines = [lines[0], " ".join(lines[1:])]
        super().__init__("\n".join(_printable(line) for line in [*lines, last]))


def unusable(option: str, path: object, error: OSError) -> OptionError:
    """The OptionError for an error of the operating system in DENIED or BROKEN. `option` may be ""."""
    remedy = f"let user {os.geteuid()} read and write it, or pass another path"
    if error.errno in BROKEN:
        remedy = "look at the disk or the network, and in the kernel's log (dmesg); then run the command again"
    return OptionError(f"{option} {error.filename or path}: {error.strerror}\n{remedy}")


def other_place(error: OSError) -> str:
    """Where data can be prepared after an error of the cache, in words."""
    return "a directory on another disk" if error.errno in BROKEN else "a directory with more room"


def install(*packages: str) -> str:
    """The command that installs packages for the Python that runs this program."""
    return f"{shlex.quote(sys.executable)} -m pip install {' '.join(packages)}"


@contextlib.contextmanager
def naming(option: str, path: object) -> Iterator[None]:
    """Raise OptionError with `option` if the block may not read or write a file, or its disk fails.

    Other errors stay as they are. The error of a read has no file name, so `path` is named then.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DENIED + BROKEN:
            raise unusable(option, path, error) from error
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OptionError with `path` for an OSError of the block, because the error of a write has no file name."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL or error.errno is None else "let the run write there"
        remedy = "look at the disk, and in the kernel's log (dmesg)" if error.errno in BROKEN else remedy
        raise OptionError(
            f"{error.filename or path}: it cannot be written: {error.strerror or error}\n"
            f"{remedy}, or pass another --output_dir; the checkpoints are intact: --resume_from_checkpoint auto"
        ) from error


@contextlib.contextmanager
def noting(failures: list[OptionError], path: Path) -> Iterator[None]:
    """Add the OptionError of `writing` to `failures`, for a file that one rank writes alone.

    If this rank raised, the others would wait for it in a collective. The loop agrees on all failures once a step.
    """
    try:
        with writing(path):
            yield
    except OptionError as error:
        failures.append(error)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters, for the text of an OptionError."""
    text = f"unknown key {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def _printable(line: str) -> str:
    """A line without control characters, and without the middle of a very long value."""
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
