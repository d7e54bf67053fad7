"""Proves config/errors.py: writing, and what uses it: a full disk ends a run with the path and a remedy.

The disk is a real one of two MB, in memory. Only root may mount it, so elsewhere these tests are skipped.
"""

import errno
import pkgutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from checkpoint.load import problems
from metrics.recorder import Recorder
from tests.launch import train, train_ok

WRITERS = {
    "metrics.jsonl": "metrics.recorder.Recorder.log",
    "ledger": "data.ledger.Ledger.write",
    "trace": "metrics.trace.Trace._write",
    "export": "checkpoint.export.write_model",
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mount.stderr}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill_before(disk: Path, function: str, pages: int) -> None:
    """Patch a rank: rank 0 fills the disk before the first call of a function, up to `pages` of 4,096 bytes."""
    place, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(place)
    original, filled = getattr(owner, name), disk / "filler"

    def patched(*args: Any, **kwargs: Any) -> Any:
        if not filled.exists():
            with open(filled, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(file.tell() - 4096 * pages)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


@pytest.mark.parametrize(
    ("what", "path", "pages", "options"),
    [
        ("metrics.jsonl", "metrics.jsonl", 1, ["--max_steps", 40]),
        ("export", "", 2, ["--max_steps", 2]),
        pytest.param("ledger", "ledger/rank-0.jsonl", 0, ["--max_steps", 40, "--ledger"], marks=pytest.mark.slow),
        pytest.param("trace", "trace/steps-3-3.json", 0, ["--trace_steps", 1], marks=pytest.mark.slow),
    ],
)
def test_full_disk(
    tiny: list[object], small_disk: Path, what: str, path: str, pages: int, options: list[object]
) -> None:
    """One line with the path and the remedy, exit code 2, no traceback, and the checkpoints are intact."""
    run = small_disk / "run"
    argv = [*tiny, "--output_dir", run, *options]
    outcome = train(1, argv, before=partial(fill_before, small_disk, WRITERS[what], pages))
    assert outcome.exit_codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert f"train.py: error: {run / path}" in outcome.output
    assert ("the profiler could not write" if what == "trace" else "No space left on device") in outcome.output
    assert "make room, or pass another --output_dir; the checkpoints are intact" in outcome.output
    if what == "export":
        assert problems(run / "checkpoint-2") == []
        assert list(run.glob(".exporting-*")) == []
        (small_disk / "filler").unlink()
        assert "step 2 of 2: the run is complete" in train_ok(1, *argv, "--resume_from_checkpoint", "auto")
        assert (run / "model.safetensors").exists()


def test_tensorboard(tmp_path: Path) -> None:
    """Its thread writes, so a full disk shows at a later record, or at the end."""

    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = Recorder.__new__(Recorder)
    recorder.writes, recorder.path, recorder.tokens_seen, recorder.trace = True, tmp_path / "metrics.jsonl", 1, None
    recorder.plan = SimpleNamespace(steps_per_epoch=1)  # type: ignore[assignment]
    recorder.board = SimpleNamespace(add_scalar=fails, close=fails)
    recorder.bar = tqdm(disable=True)
    for write in (partial(recorder._write, 1, loss=1.0), recorder.close):
        recorder.failures = []
        write()
        (failure,) = recorder.failures
        assert str(failure).startswith(f"{tmp_path}/tensorboard: it cannot be written: No space left on device\n")
