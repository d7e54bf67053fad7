"""Proves train.py in runs of minutes: the demo to its end, and many runs in a row."""

import subprocess
import sys
from pathlib import Path

import pytest

from metrics.records import read_records
from tests.launch import ROOT, train

pytestmark = pytest.mark.slow


def test_the_embedded_default_learns(tmp_path: Path) -> None:
    """`make train` as it stands: from ln(4096) to below 4.2 nats."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    evaluations = [
        row["eval_loss"] for row in read_records(tmp_path / "output" / "metrics.jsonl") if "eval_loss" in row
    ]
    assert evaluations[0] > 8
    assert evaluations[-1] < 4.2


def test_teardown(tiny: list[object], tmp_path: Path) -> None:
    """50 of 50 two-rank runs that read and write distributed checkpoints end without a crash."""
    for index in range(50):
        strategy = "ddp" if index % 2 else "fsdp"
        options = [*tiny, "--output_dir", tmp_path, "--strategy", strategy, "--resume_from_checkpoint", "auto"]
        outcome = train(2, [*options, "--max_steps", index + 1, "--save_total_limit", 1])
        assert outcome.exit_codes == [0, 0], (index, outcome.output)
