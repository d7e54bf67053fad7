"""docs/museum.md: the story, the symptom, the lines and the plot of each bug."""

import difflib

from tests.launch import ROOT
from tests.museum.bugs import CHAPTERS, GROUPS, Bug, Change

INTRODUCTION = """\
# The museum of bugs

Distributed training fails quietly: a wrong line does not crash, it trains a different model. These are the classics.
Each one is a change to the real code of this trainer. `make test` plants every bug in a copy of the tree and runs the
test that is named under it, which must then fail (`tests/museum/`). `make museum` writes this page. It plots what the
tiny model of the tests shows of {curves} bugs. The other {others} cannot be seen in a curve, so they need a test.

To look for a bug before you read about it, run `make quiz`: it plants one in a copy of the tree. `CHAPTER=n` plants one
of a chapter, and `SEED=n` plants the same one again. [CONTRIBUTING.md](../CONTRIBUTING.md) says how to write the next
bug.

| chapter | bugs |
|---|---|
{chapters}
"""


def render(bugs: list[Bug]) -> str:
    """The page in Markdown: by group, for each bug its story, its symptom, the lines, and the test that kills it."""
    curves = sum(bug.curve is not None for bug in bugs)
    chapters = [
        f"| {number} {title} | {', '.join(linked(bug) for bug in bugs if bug.chapter == number)} |"
        for number, title in CHAPTERS.items()
    ]
    parts = [INTRODUCTION.format(curves=curves, others=len(bugs) - curves, chapters="\n".join(chapters))]
    for group, meaning in GROUPS.items():
        links = ", ".join(linked(bug) for bug in bugs if bug.group == group)
        parts.append(f"- **[{group.capitalize()}](#{group})**, {meaning}: {links}")
    for group, meaning in GROUPS.items():
        parts.append(f"\n## {group.capitalize()}\n\n{meaning.capitalize()}.\n")
        parts += [render_bug(bug) for bug in bugs if bug.group == group]
    return "\n".join(parts)


def render_bug(bug: Bug) -> str:
    story = f"{bug.story} {link(bug.source)}" if bug.source else bug.story
    lines = [f"### {bug.name}", "", story, "", f"**Symptom.** {bug.symptom}", ""]
    if bug.curve:
        lines += [f"![{bug.curve.value} with and without the bug](museum/{anchor(bug)}.svg)", ""]
    for file in dict.fromkeys(change.file for change in bug.changes):
        lines += [f"`{file}`", "", "```diff", *difference(file, bug.changes), "```", ""]
    return "\n".join([*lines, f"Killed by `{bug.killer}`.", ""])


def linked(bug: Bug) -> str:
    """The bug's name, with a link to its section."""
    return f"[{bug.name}](#{anchor(bug)})"


def anchor(bug: Bug) -> str:
    """The name under which Markdown renderers link a heading."""
    return bug.name.lower().replace(" ", "-").replace(",", "")


def link(source: str) -> str:
    """The Markdown link to an issue or pull request; GitHub sends the one to the other."""
    repository, number = source.split("#")
    return f"([{source}](https://github.com/{repository}/issues/{number}))"


def patch(file: str, changes: tuple[Change, ...]) -> list[str]:
    """The lines of a unified diff: what the changes do to a file, with two lines of context around them."""
    right = wrong = (ROOT / file).read_text()
    for change in changes:
        if change.file == file:
            wrong = wrong.replace(change.right, change.wrong)
    names = (f"a/{file}", f"b/{file}")
    return list(difflib.unified_diff(right.splitlines(), wrong.splitlines(), *names, lineterm="", n=2))


def difference(file: str, changes: tuple[Change, ...]) -> list[str]:
    """The diff for the page: dedented, and without file names and line numbers."""
    lines = patch(file, changes)[3:]
    indent = min(len(line) - len(line[1:].lstrip()) - 1 for line in lines if line[1:].strip() and line[0] != "@")
    return ["..." if line.startswith("@@") else (line[0] + line[1 + indent :]).rstrip() for line in lines]


def plot(label: str, right: list[tuple[int, float]], wrong: list[tuple[int, float]]) -> str:
    """An SVG of two curves over steps, [(step, value), ...]: right, and with the bug."""
    from metrics.report.plots import Chart, Series, to_svg  # matplotlib, which the other tests do without

    series = []
    for name, color, points in (("right", "--c8", right), ("with the bug", "--bad", wrong)):
        steps, values = zip(*points, strict=True)
        series.append(Series(f"{name} (at the end {values[-1]:.4g})", steps, values, color, width=2.0))
    return to_svg(Chart(label, label, "", series), (5.8, 2.5))
