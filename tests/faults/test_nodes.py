"""Proves that training on two nodes is training on one, and what happens when a node or the network fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes, not_permitted, on_nodes, two_nodes
from tests.launch import train, train_ok
from tests.test_resume import equal_to_the_bit, trajectory

pytestmark = pytest.mark.skipif(bool(not_permitted()), reason=not_permitted())


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path / "nodes") as nodes:
        yield nodes


@pytest.mark.fault("distributed", "two nodes of two ranks", "the run of one node with four ranks, to the bit")
def test_two_nodes_are_one(tiny: list[object], tmp_path: Path, nodes: Nodes) -> None:
    options = [*tiny, "--max_steps", 4, "--strategy", "fsdp"]
    outcome = train(4, [*options, "--output_dir", tmp_path / "two"], before=on_nodes(nodes))
    assert outcome.exit_codes == [0] * 4, outcome.output
    train_ok(4, *options, "--output_dir", tmp_path / "one")
    assert trajectory(tmp_path / "two") == trajectory(tmp_path / "one")
    assert equal_to_the_bit(tmp_path / "two" / "checkpoint-4", tmp_path / "one" / "checkpoint-4")
