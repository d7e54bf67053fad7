"""Proves runtime.py: after SIGTERM or Ctrl-C, a run finishes its step, saves it and ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.load import problems
from metrics.records import read_records
from tests.launch import ROOT, train_ok
from tests.test_resume import trajectory

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.mark.parametrize(
    ("number", "launcher"),
    [
        pytest.param(signal.SIGTERM, [], id="SIGTERM"),
        pytest.param(signal.SIGTERM, TORCHRUN, id="SIGTERM to torchrun"),
        pytest.param(signal.SIGINT, [], id="SIGINT", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, TORCHRUN, id="SIGINT to torchrun", marks=pytest.mark.slow),
    ],
)
def test_stop_and_resume(tiny: list[object], tmp_path: Path, number: signal.Signals, launcher: list[str]) -> None:
    """A signal to the process or to torchrun, which hands it to all of its process group, workers of loaders too.

    Then resumed on one process, against a run that nobody disturbed.
    """
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    # Slow enough to be still running: the 400 steps would take several seconds.
    options = [*tiny, "--max_steps", 400, "--lr_scheduler_type", "constant_with_warmup", "--dataloader_num_workers", 2]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, options), "--output_dir", str(stopped)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not read_records(stopped / "metrics.jsonl")[3:]:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate()
    assert run.returncode == (1 if launcher else 0), errors  # torchrun says 1 after a signal, whatever its ranks say
    assert "DataLoader worker" not in errors
    (saved,) = stopped.glob("checkpoint-*")
    assert problems(saved) == []
    step = int(saved.name.split("-")[1])
    assert read_records(stopped / "metrics.jsonl")[-1]["step"] == step < 400

    steps = ["--max_steps", step + 10, "--lr_scheduler_type", "constant_with_warmup"]
    train_ok(1, *tiny, *steps, "--output_dir", stopped, "--resume_from_checkpoint", "auto")
    train_ok(1, *tiny, *steps, "--output_dir", undisturbed)
    for row, reference in zip(trajectory(stopped), trajectory(undisturbed), strict=True):
        assert row["tokens_seen"] == reference["tokens_seen"]
        if "loss" in row:
            assert row["loss"] == pytest.approx(reference["loss"], abs=1e-5)
