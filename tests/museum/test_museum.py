"""Every planted bug is caught by the test that it names."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from estimate.activations import GROUPED_PRODUCT
from tests.launch import ROOT
from tests.museum.bugs import BUGS, Bug
from tests.museum.page import render
from tests.museum.plant import Reports, plant, run_test

COMPARES_RUNS = [bug for bug in BUGS if "test_same_curve" in bug.killer or "test_bf16_stays_near" in bug.killer]
QUICK = list({bug.group: bug for bug in reversed(BUGS)}.values())  # the first of each group; CI runs all


@pytest.fixture(autouse=True)
def operators() -> Iterator[None]:
    """A planted tree replaces no operator of this process: torch would free the first one."""
    yield
    assert torch.ops.trainer.grouped_product.default is GROUPED_PRODUCT


def name(bug: Bug) -> str:
    return bug.name.replace(" ", "_")


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=[] if bug in QUICK else [pytest.mark.slow], id=name(bug)) for bug in BUGS]
)
def test_its_test_kills_it(bug: Bug, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Runs of the planted tree are compared with those of the right tree, which are made once for all bugs."""
    reference = request.getfixturevalue("reference") if bug in COMPARES_RUNS else None
    check_killed(bug, run_test(plant(bug, tmp_path), bug.killer, reference))


@pytest.mark.slow
@pytest.mark.parametrize("bug", COMPARES_RUNS, ids=name)
def test_its_test_kills_it_unaided(bug: Bug, tmp_path: Path) -> None:
    """Also when the reference has the bug, as it has where the bug is not planted but made."""
    check_killed(bug, run_test(plant(bug, tmp_path), bug.killer))


def check_killed(bug: Bug, reports: Reports) -> None:
    """The test has failed in its own body, by an assertion: not because the planted line could not even run."""
    assert reports.others == []
    ((outcome, words),) = reports.calls
    assert outcome == "failed", f"{bug.killer} still passes with the bug: {bug.name}"
    assert re.search(r"^E +(AssertionError|assert|Failed)", words, re.MULTILINE), words
    assert not re.search(r"SyntaxError|ImportError|NameError|AttributeError|TypeError", words), words


def test_there_are_enough() -> None:
    assert len(BUGS) >= 24
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_the_page_is_theirs() -> None:
    """docs/museum.md tells of the bugs as they are planted; `make museum` writes it."""
    assert (ROOT / "docs" / "museum.md").read_text() == render(BUGS)
