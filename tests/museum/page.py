"""docs/museum.md: each bug as a page's worth of teaching."""

import difflib
from textwrap import dedent

from tests.museum.bugs import Bug

INTRODUCTION = """\
# The museum of bugs

Distributed training fails quietly: a wrong line does not crash, it trains another model. These are the classics, each
as a change to the real code of this trainer. `make test` plants every one of them in a copy of the tree and runs the
test that is named under it, which must then fail (`tests/museum/`). `make museum` wrote this page, and drew what the
tiny model of the tests shows of a bug in {curves} of the {bugs} cases; the others cannot be seen in a curve, which is
why they need a test.
"""


def render(bugs: list[Bug]) -> str:
    """The page in Markdown: for each bug its story, its symptom, the lines, and the test that kills it."""
    parts = [INTRODUCTION.format(curves=sum(bug.curve is not None for bug in bugs), bugs=len(bugs))]
    parts.append("\n".join(f"{number}. [{bug.name}](#{anchor(bug)})" for number, bug in enumerate(bugs, 1)) + "\n")
    for bug in bugs:
        story = f"{bug.story} {link(bug.source)}" if bug.source else bug.story
        lines = [f"## {bug.name}", "", story, "", f"**What one sees.** {bug.symptom}", ""]
        if bug.curve:
            lines += [f"![{bug.curve.value} with and without the bug](museum/{anchor(bug)}.svg)", ""]
        for change in bug.changes:
            lines += [f"`{change.file}`", "", "```diff", *difference(change.right, change.wrong), "```", ""]
        lines += [f"Killed by `{bug.killer}`.", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def anchor(bug: Bug) -> str:
    """The name under which Markdown renderers link a heading."""
    return bug.name.lower().replace(" ", "-").replace(",", "")


def link(source: str) -> str:
    """The Markdown link to an issue or pull request; GitHub sends the one to the other."""
    repository, number = source.split("#")
    return f"([{source}](https://github.com/{repository}/issues/{number}))"


def difference(right: str, wrong: str) -> list[str]:
    """The lines that the bug takes away (-) and puts in their place (+); those that stay, unmarked."""
    before, after = dedent(right).strip("\n").splitlines(), dedent(wrong).strip("\n").splitlines()
    return [line for line in difflib.ndiff(before, after) if not line.startswith("?")]


def plot(title: str, right: list[tuple[int, float]], wrong: list[tuple[int, float]]) -> str:
    """An SVG of two curves over steps, [(step, value), ...]: gray is right, red has the bug."""
    width, height, left, bottom = 560, 200, 48, 24
    values = [value for _, value in [*right, *wrong]]
    low, high, last = min(values), max(values), max(step for step, _ in [*right, *wrong])

    def line(points: list[tuple[int, float]], color: str) -> str:
        places = " ".join(
            f"{left + (width - left - 10) * step / last:.1f},"
            f"{10 + (height - bottom - 20) * (high - value) / (high - low or 1):.1f}"
            for step, value in points
        )
        return f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{places}"/>'

    def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#555") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{words}</text>'

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            line(right, "#999"),
            line(wrong, "#d33"),
            text(left - 6, 14, f"{high:.3g}", "end"),
            text(left - 6, height - bottom - 8, f"{low:.3g}", "end"),
            text(width - 10, height - 6, f"step {last}", "end"),
            text(left, height - 6, f"{title}: right, at the end {right[-1][1]:.4g}"),
            text(left + 220, height - 6, f"with the bug {wrong[-1][1]:.4g}", color="#d33"),
            "</svg>\n",
        ]
    )
