"""docs/promises.md: each fault that a test injects, what the trainer promises then, and the test.

    PYTHONPATH=. python -m tests.faults.promises

The page is written from the marks of the tests, @pytest.mark.fault(area, fault, promise), which are literal strings.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from tests.launch import ROOT

PAGE = ROOT / "docs" / "promises.md"
AREAS = ("process", "storage", "data", "numerics", "configuration", "distributed", "security")
HEAD = """# What the trainer promises when something fails

Each row is a fault that a test injects from outside, and what must happen then. `make test` runs the quick tests, and
`make test-all` also the slow ones. Tests that need root or namespaces are skipped elsewhere, with the reason.

This page is written from the tests by `python -m tests.faults.promises`.
"""


class Promise(NamedTuple):
    """A fault, what must happen, and the test that injects it."""

    area: str
    fault: str
    promise: str
    path: Path
    test: str
    slow: bool


def promises() -> list[Promise]:
    """All marks `fault` of the tests, by area, then by file."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                marks = [mark for mark in node.decorator_list if ast.unparse(mark).startswith("pytest.mark.fault(")]
                slow = any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
                for mark in marks:
                    assert isinstance(mark, ast.Call)
                    area, fault, promise = map(ast.literal_eval, mark.args)
                    found.append(Promise(area, fault, promise, path, node.name, slow))
    return sorted(found, key=lambda each: (AREAS.index(each.area), each.path))


def page() -> str:
    """The text of docs/promises.md."""
    lines, every = [HEAD], promises()
    for area in AREAS:
        lines += [f"## {area.capitalize()}", "", "| fault | promise | test |", "|---|---|---|"]
        for each in every:
            if each.area == area:
                test = f"[{each.test}](../{each.path.relative_to(ROOT)})" + (", slow" if each.slow else "")
                lines.append(f"| {each.fault} | {each.promise} | {test} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
