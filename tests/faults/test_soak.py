"""One round of tests/faults/soak.py with a fixed seed, and what it finds in a run that lies."""

import json
from pathlib import Path

import pytest

from tests.faults.soak import compare, soak_round
from tests.launch import train_ok


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault(
    "process",
    "several random faults in one run: kills, signals, stopped ranks, damaged checkpoints and prepared data",
    "losses, ledger, finished model and files are those of a run without faults",
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_round(tiny: list[object], tmp_path: Path, seed: int) -> None:
    assert soak_round(seed, tiny, tmp_path) == []


@pytest.mark.slow
def test_differences_are_found(tiny: list[object], tmp_path: Path) -> None:
    for name, rate in (("run", 3e-3), ("unbroken", 3.001e-3)):
        options = ["--max_steps", 4, "--ledger", "--learning_rate", rate, "--output_dir", tmp_path / name]
        train_ok(1, *tiny, *options)
    assert len(compare(tmp_path / "run", tmp_path / "unbroken", exact=True)) == 2
    assert len(compare(tmp_path / "run", tmp_path / "unbroken", exact=False)) == 2
    path = next((tmp_path / "run" / "ledger").glob("rank-*.jsonl"))
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[:-1]) + "\n")
    assert json.loads(rows[-1])
    assert len(compare(tmp_path / "run", tmp_path / "unbroken", exact=True)) > 2
