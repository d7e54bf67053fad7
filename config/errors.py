"""The exception for a mistake of the user, or for a disk that cannot be written."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

LONGEST = 2000  # characters of a line
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OptionError with `path` for an OSError of the block, because the error of a write has no file name."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL or error.errno is None else "let the run write there"
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


def first_line(error: Exception) -> str:
    """The first line of an exception's message, at most 200 characters, for the text of an OptionError."""
    text = f"unknown key {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def _printable(line: str) -> str:
    """A line without control characters, and without the middle of a very long value."""
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
