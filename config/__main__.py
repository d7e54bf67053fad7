"""Print the options that a DeepSpeed file sets: python -m config FILE --ranks N [options of train.py]."""

import argparse
import sys

from config.checks import check
from config.command_line import parse
from config.errors import OptionError


def main(argv: list[str]) -> None:
    """Print the table of the keys of a file, and check the options. Raises OptionError."""
    parser = argparse.ArgumentParser(
        prog="python -m config", description="Print what each key of a DeepSpeed file means here."
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="number of ranks of the run")
    arguments, options_of_train = parser.parse_known_args(argv)
    if arguments.ranks < 1:
        raise OptionError(f"ranks {arguments.ranks}: must be at least 1")
    options = parse(["--deepspeed", arguments.file, *options_of_train], arguments.ranks)  # prints the table
    check(options, arguments.ranks)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"config: error: {error}", file=sys.stderr)
        sys.exit(2)
