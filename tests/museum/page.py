"""docs/museum.md: the story, the symptom, the lines and the plot of each bug."""

import difflib

from tests.launch import ROOT
from tests.museum.bugs import GROUPS, Bug, Change

INTRODUCTION = """\
# The museum of bugs

Distributed training fails quietly: a wrong line does not crash, it trains a different model. These are the classics.
Each one is a change to the real code of this trainer. `make test` plants every bug in a copy of the tree and runs the
test that is named under it, which must then fail (`tests/museum/`). `make museum` writes this page. It plots what the
tiny model of the tests shows of {curves} bugs. The other {others} cannot be seen in a curve, so they need a test.
"""


def render(bugs: list[Bug]) -> str:
    """The page in Markdown: by group, for each bug its story, its symptom, the lines, and the test that kills it."""
    parts = [
        INTRODUCTION.format(curves=(curves := sum(bug.curve is not None for bug in bugs)), others=len(bugs) - curves)
    ]
    for group, meaning in GROUPS.items():
        links = ", ".join(f"[{bug.name}](#{anchor(bug)})" for bug in bugs if bug.group == group)
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


def anchor(bug: Bug) -> str:
    """The name under which Markdown renderers link a heading."""
    return bug.name.lower().replace(" ", "-").replace(",", "")


def link(source: str) -> str:
    """The Markdown link to an issue or pull request; GitHub sends the one to the other."""
    repository, number = source.split("#")
    return f"([{source}](https://github.com/{repository}/issues/{number}))"


def difference(file: str, changes: tuple[Change, ...]) -> list[str]:
    """What the changes do to a file, in whole lines with two lines of context around them, dedented."""
    right = wrong = (ROOT / file).read_text()
    for change in changes:
        if change.file == file:
            wrong = wrong.replace(change.right, change.wrong)
    lines = list(difflib.unified_diff(right.splitlines(), wrong.splitlines(), lineterm="", n=2))[3:]
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
