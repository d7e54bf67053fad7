"""Proves train.py on every family of models (tests/table.py): no cell of docs/models.md is wrong or gets worse."""

import re
from pathlib import Path

import pytest

from tests.table import COLUMNS, GATE, PAGE, Cell, difference, judged, make_shared, measure, page, read_page
from tests.zoo import NAMES, config

# The columns of `make test`, by family.
QUICK = {"qwen3_next": ("packed", "memory", "head")}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    make_shared(directory)
    return directory


def check(name: str, cells: dict[str, Cell]) -> None:
    """No cell is wrong, and each one has the verdict of docs/models.md."""
    assert not {column: cell.text for column, cell in cells.items() if cell.verdict == "wrong"}
    told = read_page(PAGE.read_text())[name]
    assert {column: cell.verdict for column, cell in cells.items()} == {column: told[column] for column in cells}


@pytest.mark.parametrize("name", QUICK)
def test_some_columns(name: str, shared: Path, tmp_path: Path) -> None:
    check(name, measure(name, tmp_path, shared, QUICK[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_columns(name: str, shared: Path, tmp_path: Path) -> None:
    check(name, measure(name, tmp_path, shared))


def test_every_family_has_a_configuration() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        assert config(name).model_type == name


def test_the_page_has_every_family_and_no_wrong_cell() -> None:
    told = read_page(PAGE.read_text())
    assert tuple(told) == NAMES
    assert {verdict for row in told.values() for verdict in row.values()} <= {"right", "refused"}


def test_the_page_says_what_was_measured() -> None:
    """A page is read back as it was written; a reason for many refusals is one note."""
    refused, wrong = Cell("refused", "--packing documents: a reason"), Cell("wrong", "ValueError: a | b")
    rows = {
        "llama": dict.fromkeys(COLUMNS, judged(2e-7)) | {"packed": refused},
        "opt": dict.fromkeys(COLUMNS, refused) | {"fsdp": wrong, "plain": judged(2 * GATE)},
    }
    text = page(rows)
    assert read_page(text) == {
        name: {column: cell.verdict for column, cell in row.items()} for name, row in rows.items()
    }
    assert re.findall(r"^\d+\. .*", text, re.MULTILINE)[:1] == ["1. --packing documents: a reason"]
    assert text.count("a reason") == 1


def test_a_difference_is_found() -> None:
    """Loss by its amount, gradient norm by its fraction; a run with fewer steps is no equal run."""
    expected = [{"loss": 6.0, "grad_norm": 2.0}, {"loss": 5.0, "grad_norm": 2.0}]
    assert difference(expected, expected) == 0
    assert difference([expected[0], {"loss": 5.25, "grad_norm": 2.0}], expected) == pytest.approx(0.25)
    assert difference([expected[0], {"loss": 5.0, "grad_norm": 3.0}], expected) == pytest.approx(0.5)
    with pytest.raises(AssertionError):
        difference(expected[:1], expected)
    assert judged(float("nan")).verdict == "wrong"
