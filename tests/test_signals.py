"""A run that is asked to stop finishes its step, saves it and ends; nothing of it is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
import metrics
from tests.launch import ROOT, train_ok
from tests.test_resume import trajectory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume(tiny: list[object], tmp_path: Path, number: signal.Signals) -> None:
    """One process under a signal, then resumed, against a run that nobody disturbed."""
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    options = [str(word) for word in [*tiny, "--max_steps", 400, "--lr_scheduler_type", "constant"]]
    command = [sys.executable, str(ROOT / "train.py"), *options, "--output_dir", str(stopped)]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while not metrics.read_rows(stopped / "metrics.jsonl")[3:]:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    (saved,) = stopped.glob("checkpoint-*")
    assert checkpoint.problems(saved) == []
    step = int(saved.name.split("-")[1])
    assert metrics.read_rows(stopped / "metrics.jsonl")[-1]["step"] == step < 400

    steps = ["--max_steps", step + 10, "--lr_scheduler_type", "constant"]
    train_ok(1, *tiny, *steps, "--output_dir", stopped, "--resume_from_checkpoint", "auto")
    train_ok(1, *tiny, *steps, "--output_dir", undisturbed)
    assert trajectory(stopped) == trajectory(undisturbed)
