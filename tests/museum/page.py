"""docs/museum.md: the story, the symptom, the lines and the plot of each bug."""

import difflib
import math

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
    """An SVG of two curves over steps, [(step, value), ...], with axes and a legend: gray is right, red has the bug."""
    width, height, left, right_edge, top, bottom = 560, 240, 70, 545, 30, 200
    everything = [*right, *wrong]
    across = ticks(0, max(step for step, _ in everything))
    up = ticks(min(value for _, value in everything), max(value for _, value in everything))

    def x(step: float) -> float:
        return left + (right_edge - left) * (step - across[0]) / (across[-1] - across[0])

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - up[0]) / (up[-1] - up[0])

    def line(points: list[tuple[float, float]], color: str, thickness: int) -> str:
        places = " ".join(f"{at:.1f},{height_at:.1f}" for at, height_at in points)
        return f'<polyline fill="none" stroke="{color}" stroke-width="{thickness}" points="{places}"/>'

    def text(at: float, height_at: float, words: str, anchor: str, turned: str = "") -> str:
        return f'<text x="{at:.1f}" y="{height_at:.1f}" text-anchor="{anchor}" fill="#444"{turned}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for step in across:
        parts += [line([(x(step), bottom), (x(step), bottom + 4)], "#444", 1)]
        parts += [text(x(step), bottom + 16, f"{step:g}", "middle")]
    for value in up:
        parts += [line([(left, y(value)), (right_edge, y(value))], "#eee", 1)]
        parts += [text(left - 6, y(value) + 4, f"{value:g}", "end")]
    parts += [
        line([(left, top), (left, bottom), (right_edge, bottom)], "#444", 1),
        text((left + right_edge) / 2, height - 8, "step", "middle"),
        text(14, (top + bottom) / 2, label, "middle", f' transform="rotate(-90 14 {(top + bottom) / 2:.0f})"'),
    ]
    for index, (name, color, points) in enumerate((("right", "#888", right), ("with the bug", "#d33", wrong))):
        start = left + 10 + 230 * index
        parts += [line([(x(step), y(value)) for step, value in points], color, 2)]
        parts += [line([(start, 16), (start + 20, 16)], color, 2)]
        parts += [text(start + 26, 20, f"{name} (at the end {points[-1][1]:.4g})", "start")]
    return "\n".join([*parts, "</svg>\n"])


def ticks(low: float, high: float) -> list[float]:
    """About five round values that enclose low and high."""
    raw = (high - low or 1) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, max(last, first + 1) + 1)]
