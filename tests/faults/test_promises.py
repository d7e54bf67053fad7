"""docs/promises.md is written from the tests."""

from tests.faults.promises import PAGE, page, promises


def test_page_is_written_from_the_tests() -> None:
    assert PAGE.read_text() == page(), "run: PYTHONPATH=. python -m tests.faults.promises"


def test_every_fault_is_named_once() -> None:
    faults = [each.fault for each in promises()]
    assert len(faults) == len(set(faults))
