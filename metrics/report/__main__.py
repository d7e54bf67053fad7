"""Write a page about one run or several: python -m metrics.report output [other runs ...]."""

import argparse
import sys
from pathlib import Path

from config.errors import OptionError
from metrics.report import PAGE, write_report

COMPARISON = "compared.html"  # not PAGE, which is about the first run alone


def main(argv: list[str]) -> None:
    """Write the page for the directories that `argv` names, and print the paths of what was written."""
    parser = argparse.ArgumentParser(prog="python -m metrics.report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="output_dir", help="directory of a run; several to compare"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the page; default: {PAGE} in the directory, or {COMPARISON} in the first of several",
    )
    parser.add_argument("--png", action="store_true", help="also write a picture of the charts, next to the page")
    arguments = parser.parse_args(argv)
    page = arguments.output or arguments.runs[0] / (PAGE if len(arguments.runs) == 1 else COMPARISON)
    for path in write_report(arguments.runs, page, arguments.png):
        print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"metrics.report: error: {error}", file=sys.stderr)
        sys.exit(2)
