"""Print what a bug report needs about this machine: python -m runtime.doctor [options of train.py]."""

import sys

from config.command_line import parse
from config.errors import OptionError
from runtime.doctor.report import rows

INDENT = 15


def main(argv: list[str]) -> None:
    """Print the report, for the directories that `argv` names. Raises OptionError."""
    options = parse(argv)
    for name, value, limit in rows(options):
        first, *more = (value or "none").splitlines()
        print(f"{name:<{INDENT - 1}} {first}")
        for line in [*more, *([f"-> {limit}"] if limit else [])]:
            print(f"{'':<{INDENT}}{line}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"doctor: error: {error}", file=sys.stderr)
        sys.exit(2)
