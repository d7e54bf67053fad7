"""The one exception for what a user can get wrong."""


class OptionError(ValueError):
    """What a user can get wrong. Its text names the option, the value and the remedy in at most three lines."""


def first_line(error: Exception) -> str:
    """What an exception has to say, short enough for such a text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
