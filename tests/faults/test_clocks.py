"""Proves runtime/hang/watch.py, metrics/recorder.py and data/sources.py: clocks that are wrong, or that are set."""

import os
import time
from functools import partial
from pathlib import Path

import pytest

import metrics
from checkpoint.load import problems
from data.sources import _hash_once
from metrics.records import read_records
from runtime.hang import watch
from tests.launch import train, train_ok
from tests.test_resume import trajectory

HOUR = 3600.0


def set_clock(hours: float) -> None:
    """Patch a rank: in step 3, the clock of rank 1 jumps, and rank 0 waits for it. Silent ranks are reported early."""
    watch.PATIENCE = 1.0
    rank, step, now, wait = int(os.environ["RANK"]), metrics.Recorder.step, time.time, time.sleep

    def patched(self: metrics.Recorder, tokens: int) -> None:
        step(self, tokens)
        if rank == 1 and self.steps_done == 3:
            time.time = lambda: now() + hours * HOUR
            for _ in range(10):
                wait(0.5)

    metrics.Recorder.step = patched  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.fault(
    "process",
    "somebody sets the clock of a node by an hour during a run, back or forth",
    "the run, its checkpoints and its speeds are those of an undisturbed run, and no rank is reported as silent",
)
def test_clock_that_jumps(tiny: list[object], tmp_path: Path, hours: int) -> None:
    argv = [*tiny, "--max_steps", 6, "--save_steps", 2, "--ddp_timeout", 20, "--resume_from_checkpoint", "auto"]
    outcome = train(2, [*argv, "--output_dir", tmp_path / "run"], before=partial(set_clock, hours))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "heard of" not in outcome.output
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < record["tokens_per_second"] < 1e6 for record in records if "loss" in record)
    assert problems(tmp_path / "run" / "checkpoint-6") == []
    train_ok(2, *argv, "--output_dir", tmp_path / "unbroken")
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "unbroken")


@pytest.mark.parametrize("behind", [0, HOUR], ids=["same clock", "an hour"])
@pytest.mark.fault(
    "data",
    "the clock of this node is an hour ahead of that of the file system, and a file changes twice within a moment",
    "the second change is found",
)
def test_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: float) -> None:
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    cache.mkdir(mode=0o700)
    file.write_text('{"text": "one"}')
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + behind)
    before = _hash_once([file], cache)
    status = file.stat()
    file.write_text('{"text": "two"}')
    real = Path.stat

    def coarse(path: Path, **options: bool) -> os.stat_result:
        """The status before the second change, as a file system with coarse times would report it."""
        return status if path == file else real(path, **options)

    monkeypatch.setattr(Path, "stat", coarse)
    assert _hash_once([file], cache) != before
