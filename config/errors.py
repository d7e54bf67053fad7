"""The exception for a mistake of the user, or for a disk that cannot be written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class OptionError(ValueError):
    """A mistake of the user. Its text names the option, the value and the remedy in at most three lines."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OptionError with `path` for an OSError of the block, because the error of a write has no file name."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"{path}: it cannot be written: {error.strerror or error}\n"
            "make room, or pass another --output_dir; the checkpoints are intact: --resume_from_checkpoint auto"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, at most 200 characters, for the text of an OptionError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
