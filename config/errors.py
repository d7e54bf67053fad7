"""The exception for a mistake of the user."""


class OptionError(ValueError):
    """A mistake of the user. Its text names the option, the value and the remedy in at most three lines."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, at most 200 characters, for the text of an OptionError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
