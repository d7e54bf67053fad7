"""Every planted bug is caught by the test that it names."""

import re
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.museum.bugs import BUGS, Bug
from tests.museum.page import render
from tests.museum.plant import plant, run_test


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_its_test_kills_it(bug: Bug, tmp_path: Path) -> None:
    """The test fails in its own body, by an assertion: not because the planted line could not even run."""
    reports = run_test(plant(bug, tmp_path), bug.killer)
    assert reports.others == []
    (report,) = reports.calls
    assert report.failed, f"{bug.killer} still passes with the bug: {bug.name}"
    words = str(report.longrepr)
    assert re.search(r"^E +(AssertionError|assert|Failed)", words, re.MULTILINE), words
    assert not re.search(r"SyntaxError|ImportError|NameError|AttributeError|TypeError", words), words


def test_there_are_enough() -> None:
    assert len(BUGS) >= 24
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_the_page_is_theirs() -> None:
    """docs/museum.md tells of the bugs as they are planted; `make museum` writes it."""
    assert (ROOT / "docs" / "museum.md").read_text() == render(BUGS)
