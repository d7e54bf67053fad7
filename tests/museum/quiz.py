"""Plant a bug of the museum in a copy of the tree, show its effect, and let the reader look for it (make quiz).

The copy has no git history and no tests/museum, and its files have one date. state.json holds a hash of the bug's name,
so hints and the answer know the bug, and no file of the quiz names it before.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from config.errors import OptionError
from tests.launch import ROOT
from tests.museum.__main__ import points
from tests.museum.bugs import BUGS, CHAPTERS, GROUPS, Bug, Curve
from tests.museum.page import patch
from tests.museum.plant import plant, run_test

QUIZ = ROOT / "quiz"  # git ignores it
HINTS = 3
ROWS = 20  # of the table of a curve
WIDTH = 41  # of its plot
LINES, COLUMNS = 12, 200  # of the failure of a test

QUESTION = """
A line of quiz/tree is wrong. Read the code there, find the line, and say what it breaks.
A comparison with this checkout is cheating. `make quiz HINT=1`, `HINT=2` and `HINT=3` help; `make quiz ANSWER=1` tells.
`make quiz {again}` plants this bug again."""


def main(argv: list[str], directory: Path = QUIZ) -> None:
    """Plant a bug in `directory`, or print a hint or the answer for the planted one. Raises OptionError."""
    parser = argparse.ArgumentParser(prog="make quiz", description=__doc__)
    for option in ("chapter", "seed", "hint", "answer"):
        parser.add_argument(f"--{option}")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if given.keys() & {"hint", "answer"} and len(given) > 1:
        names = " ".join(f"{name.upper()}={value}" for name, value in given.items())
        raise OptionError(f"{names}: HINT and ANSWER speak of the planted bug\nPass one of them, and nothing else.")
    if "hint" in given:
        print(hint(planted_bug(directory), number("HINT", given["hint"], 1, HINTS)))
    elif "answer" in given:
        number("ANSWER", given["answer"], 1, 1)
        print(answer(planted_bug(directory)))
    else:
        chapter = number("CHAPTER", given["chapter"], 1, len(CHAPTERS)) if "chapter" in given else None
        seed = number("SEED", given["seed"], 0, 10**9) if "seed" in given else random.randrange(10**4)
        ask(choose(chapter, seed), directory)
        print(QUESTION.format(again=f"CHAPTER={chapter} SEED={seed}" if chapter else f"SEED={seed}"))


def number(option: str, value: str, least: int, most: int) -> int:
    """The value of an option of make. Raises OptionError for other values than `least` to `most`."""
    if value.isascii() and value.isdigit() and least <= int(value) <= most:
        return int(value)
    choices = str(least) if least == most else f"a whole number from {least} to {most}"
    raise OptionError(f"{option}={value}: no such value\nPass {choices}.")


def choose(chapter: int | None, seed: int) -> Bug:
    """A bug of a chapter, or of any: the same for the same seed."""
    return random.Random(seed).choice([bug for bug in BUGS if chapter in (None, bug.chapter)])


def ask(bug: Bug, directory: Path) -> None:
    """Plant the bug in `directory`/tree, in place of an earlier one, and print what shows its effect."""
    print(f"A bug of chapter {bug.chapter}, {CHAPTERS[bug.chapter]}. It takes up to three minutes to show.", flush=True)
    with tempfile.TemporaryDirectory() as name:
        tree = plant(replace(bug, name="tree"), Path(name))
        effect = show_effect(bug, tree, Path(name))
        hide(tree)
        directory.mkdir(exist_ok=True)
        shutil.rmtree(directory / "tree", ignore_errors=True)
        (directory / "state.json").write_text(json.dumps({"bug": digest(bug)}) + "\n")
        shutil.move(tree, directory / "tree")
    print(f"\n{effect}")


def hide(tree: Path) -> None:
    """Remove what would name the planted bug: the museum, compiled files, and the dates of files."""
    shutil.rmtree(tree / "tests" / "museum")
    for compiled in [*tree.rglob("__pycache__")]:
        shutil.rmtree(compiled)
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (0, 0))


def show_effect(bug: Bug, tree: Path, directory: Path) -> str:
    """The curve with and without the bug. If no curve shows the bug: what a test says that fails because of it."""
    if bug.curve is None:
        return f"No curve shows this bug, but a test fails in quiz/tree:\n\n{failure(bug, tree)}"
    right = points(ROOT, bug.curve, directory / "right")
    wrong = points(tree, bug.curve, directory / "wrong")
    return f"{describe(bug.curve)}\n\n{table(bug.curve.value, right, wrong)}"


def failure(bug: Bug, tree: Path) -> str:
    """The failed line of the test that kills the bug, and what pytest says of it."""
    reports = run_test(tree, bug.killer)
    words = "\n".join([*reports.others, *(words for _, words in reports.calls)])
    lines = [line for line in words.splitlines() if line.startswith((">", "E"))]
    if not lines:
        raise OptionError("the test that should fail has passed\nRun `make test-all ARGS=tests/museum`.")
    return "\n".join(line.replace(f"{tree}/", "")[:COLUMNS] for line in lines[:LINES])


def describe(curve: Curve) -> str:
    """The run behind a curve, in a line."""
    parts = [f"{curve.value.replace('_', ' ')} on {curve.ranks} rank{'s' * (curve.ranks > 1)}"]
    if curve.options:
        parts.append(" ".join(map(str, curve.options)))
    if curve.resume_at:
        parts.append(f"resumed from a checkpoint at step {curve.resume_at}")
    return ", ".join(parts)


def table(label: str, right: list[tuple[int, float]], wrong: list[tuple[int, float]]) -> str:
    """The values of both runs by step, and a plot of them: o right, x with the bug, * both."""
    rights, wrongs = dict(right), dict(wrong)
    steps = sorted(rights.keys() | wrongs.keys())
    values = [*rights.values(), *wrongs.values()]
    least, most = min(values), max(values)
    bounds = f"{f'{least:.4g}':<{WIDTH - 10}}{f'{most:.4g}':>10}"
    lines = [f"{'step':>4} {'right o':>11} {'bug x':>11} {'x - o':>11}  {bounds}  {label}"]
    for step in steps[:: -(-len(steps) // ROWS)]:
        cells = [" "] * WIDTH
        for curve, mark in ((rights, "o"), (wrongs, "x")):
            if step in curve:
                column = round((curve[step] - least) / ((most - least) or 1) * (WIDTH - 1))
                cells[column] = mark if cells[column] == " " else "*"
        shown = [f"{curve[step]:.5g}" if step in curve else "none" for curve in (rights, wrongs)]
        shown.append(f"{wrongs[step] - rights[step]:+.2g}" if step in rights.keys() & wrongs.keys() else "")
        lines.append(f"{step:>4} {shown[0]:>11} {shown[1]:>11} {shown[2]:>11}  {''.join(cells)}".rstrip())
    return "\n".join(lines)


def hint(bug: Bug, which: int) -> str:
    """First the room and the group, then the file and the function, then the symptom."""
    if which == 1:
        rooms = dict.fromkeys(change.file.split("/")[0] for change in bug.changes)
        return f"The wrong line is in {' and '.join(rooms)}. It is about {bug.group}: {GROUPS[bug.group]}."
    if which == 2:
        return "\n".join(
            dict.fromkeys(f"{change.file}, {function_of(change.file, change.right)}" for change in bug.changes)
        )
    return bug.symptom


def function_of(file: str, text: str) -> str:
    """The innermost function of a file of this checkout that holds `text`."""
    source = (ROOT / file).read_text()
    line = source[: source.index(text) + len(text) - len(text.lstrip())].count("\n") + 1
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or line)
    ]
    return f"{max(around, key=lambda node: node.lineno).name}()" if around else "outside of all functions"


def answer(bug: Bug) -> str:
    """The name, the story, the change and the test of the bug."""
    changed = [
        line for file in dict.fromkeys(change.file for change in bug.changes) for line in patch(file, bug.changes)
    ]
    where = f"\nIt happened: https://github.com/{bug.source.replace('#', '/issues/')}" if bug.source else ""
    return "\n".join(
        [
            f"{bug.name[0].upper()}{bug.name[1:]}\n\n{bug.story}{where}\n\n{bug.symptom}\n",
            *changed,
            f"\nThis test fails with the bug: {bug.killer}",
            f"In quiz/tree: PYTHONPATH=. ../../.venv/bin/python -m pytest '{bug.killer}'",
        ]
    )


def digest(bug: Bug) -> str:
    """A hash of the bug's name."""
    return hashlib.sha256(bug.name.encode()).hexdigest()


def planted_bug(directory: Path) -> Bug:
    """The bug that state.json holds. Raises OptionError without one."""
    try:
        planted = json.loads((directory / "state.json").read_text())["bug"]
    except (OSError, ValueError, KeyError, TypeError):
        planted = None
    for bug in BUGS:
        if digest(bug) == planted:
            return bug
    raise OptionError(f"{directory / 'state.json'}: no planted bug\nRun `make quiz` first.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"quiz: error: {error}", file=sys.stderr)
        sys.exit(2)
