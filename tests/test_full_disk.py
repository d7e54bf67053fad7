"""Proves config/errors.py: writing, and what uses it: a full disk ends a run with the path and a remedy.

The disk is a real one of two MB, in memory. Only root may mount it, so elsewhere these tests are skipped.
"""

import dataclasses
import itertools
import os
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.export import export_model
from checkpoint.identity import Progress, RunIdentity, identify_run
from checkpoint.load import problems
from checkpoint.output_dir import claim_output_dir
from checkpoint.ranks import compute_once
from checkpoint.save import Saver
from checkpoint.state import optimizer_state
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.plan import plan_run
from data.batches import collate
from data.ledger import Ledger
from data.prepare import prepare_data
from metrics.recorder import Recorder
from metrics.records import read_records
from model.layers import decoder_layers
from optim import build_optimizer
from tests.faults.test_storage import mount_on_rank_1
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
    options = "size=2m,nr_inodes=200"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mount.stderr}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


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


def leave(disk: Path, kind: str, number: int) -> None:
    """Fill the disk, and leave a `number` of pages of 4,096 bytes, or of inodes: files and directories.

    Of the kind "read-only", a disk with the number 0 cannot be written.
    """
    if kind == "read-only":
        subprocess.run(["mount", "-o", f"remount,{'rw' if number else 'ro'}", disk], check=True)
        return
    filler = disk / ".filler"
    shutil.rmtree(filler, ignore_errors=True)
    if number < 0:
        return
    filler.mkdir()
    if kind == "pages":
        with open(filler / "0", "wb") as file:
            free = os.statvfs(disk).f_bavail
            os.posix_fallocate(file.fileno(), 0, 4096 * max(1, free - number))
    else:
        for name in range(os.statvfs(disk).f_favail - number):
            (filler / str(name)).touch()


@pytest.mark.fault(
    "storage",
    "the disk becomes full at any page, has no inode left, or becomes read-only: for a checkpoint, the final model, "
    "prepared data, the ledger, metrics.jsonl and the lock",
    "what was there before is intact, nothing half written remains, and a message names the path and the remedy",
)
@pytest.mark.parametrize(
    ("kind", "stride"),
    [("pages", 6), ("inodes", 1), ("read-only", 1), pytest.param("pages", 1, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("what", ["checkpoint", "export", "cache", "reference", "metrics.jsonl", "ledger", "lock"])
def test_full_at_every_point(
    tiny: list[object], model_dir: Path, small_disk: Path, alone: None, what: str, kind: str, stride: int
) -> None:
    run = small_disk / "run"
    options = parse([str(word) for word in [*tiny, "--output_dir", run, "--async_save", "false", "--ledger"]], 1)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    optimizer = build_optimizer(model, options)
    optimizer_state(optimizer)
    data = prepare_data(options, tokenizer)
    plan = plan_run(options, len(data.train), 1)
    identity = identify_run(options, plan, data.fingerprint, model, {})

    def save(number: int) -> None:
        Saver(options).save(model, optimizer, Progress(step=number), identity)

    def prepare(number: int) -> None:
        prepared = dataclasses.replace(options, data_cache_dir=str(run / "cache"), preprocessing_num_workers=1)
        assert prepare_data(prepared, tokenizer).fingerprint == data.fingerprint

    def log(number: int) -> None:
        recorder = Recorder(options, plan, 0, torch.device("cpu"), None)
        recorder.start("", 1, 0, False, model, decoder_layers(model))
        recorder.evaluation(2, {"eval_perplexity": 1.0, **{f"eval_{name}": 1.0 for name in range(400)}})
        Saver(options, recorder.failures).wait()

    def account(number: int) -> None:
        ledger = Ledger(options, 0, plan, data.train, 1)
        ledger.write(2, [collate([data.train[index] for index in range(200)], None)])
        Saver(options, ledger.failures).wait()

    def lock(number: int) -> None:
        claimed = claim_output_dir(dataclasses.replace(options, output_dir=str(run / "new" / "run")), 0)
        assert claimed
        claimed.close()

    def compute(number: int) -> None:
        compute_once(run / "reference.safetensors", lambda: {"reference": torch.zeros(2, 4096)})

    write = {
        **{"checkpoint": save, "export": lambda number: export_model(options, model, tokenizer, []), "cache": prepare},
        **{"reference": compute, "metrics.jsonl": log, "ledger": account, "lock": lock},
    }[what]
    run.mkdir()
    if what in ("checkpoint", "export"):  # an earlier one must stay
        write(1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    messages = []
    for number in itertools.count(0, stride):
        leave(small_disk, kind, number)
        try:
            write(number + 2)
            break
        except OptionError as error:
            messages.append(str(error))
        leave(small_disk, kind, -1)
        if before:
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
            assert not list(run.glob(".*ing-*"))
    leave(small_disk, kind, -1)
    assert messages or (what, kind) == ("lock", "pages"), "the disk was never full"  # a lock has no content
    for message in messages:
        assert re.match(f"(output_dir |data_cache_dir |){run}", message), message
        # The second is numpy's, of a file of which it could write a part.
        full = r"No space left on device|\d+ requested and \d+ written"
        assert re.search("Read-only file system" if kind == "read-only" else full, message), message
        assert re.search("room|can be written|let the run write|writable", message), message
    if what == "checkpoint":
        assert problems(run / "checkpoint-1") == problems(run / f"checkpoint-{number + 2}") == []


@pytest.mark.fault(
    "storage",
    "the disk of one rank alone is full: of its ledger",
    "all ranks end after the step with the path and the remedy",
)
@pytest.mark.slow
def test_full_on_one_rank(tiny: list[object], small_disk: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave(small_disk, "pages", 0)
    (run / "ledger").mkdir(parents=True)
    argv = [*tiny, "--output_dir", run, "--ledger", "--max_steps", 400]
    outcome = train(2, argv, before=partial(mount_on_rank_1, ["--bind", small_disk, run / "ledger"]))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert f"error: {run}/ledger/rank-1.jsonl: it cannot be written: No space left on device\n" in outcome.output
    assert len(read_records(run / "metrics.jsonl")) < 10


@pytest.mark.fault(
    "storage",
    "another program creates the directory of the next checkpoint",
    "a message; nothing of it is replaced, and nothing half written remains",
)
def test_a_checkpoint_that_exists(tiny: list[object], model_dir: Path, tmp_path: Path, alone: None) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoint-1" / "notes.txt").write_text("mine")
    options = Options(output_dir=str(run), async_save=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    identity = RunIdentity("", "", 0, 1, "")
    with pytest.raises(OptionError, match=r"the checkpoint could not be written: .*Directory not empty"):
        Saver(options).save(model, build_optimizer(model, options), Progress(step=1), identity)
    assert [path.name for path in run.rglob("*")] == ["checkpoint-1", "notes.txt"]


def full_stdout() -> None:
    """Patch a rank: what it prints goes to a full disk, and its errors do not."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.fault(
    "storage",
    "the log that a run prints to is on a full disk",
    "all ranks end after the step with a message",
)
@pytest.mark.slow
def test_full_log(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(2, [*tiny, "--output_dir", tmp_path, "--max_steps", 400], before=full_stdout)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert "error: stdout: it cannot be written: No space left on device\nmake room" in outcome.output
    assert len(read_records(tmp_path / "metrics.jsonl")) < 10


@pytest.mark.fault(
    "storage",
    "the path of `output_dir` is so long that a file of a checkpoint has no name",
    "a message, and nothing half written remains",
)
def test_a_path_that_is_too_long(tiny: list[object], model_dir: Path, tmp_path: Path, alone: None) -> None:
    run = tmp_path
    while len(str(run)) < 3800:
        run = run / ("d" * 200)
    run = run / ("d" * (4096 - len(str(run)) - 80))
    run.mkdir(parents=True)
    options = Options(output_dir=str(run), async_save=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    identity = RunIdentity("", "", 0, 1, "")
    with pytest.raises(OptionError, match=r"the checkpoint could not be written: .*File name too long"):
        Saver(options).save(model, build_optimizer(model, options), Progress(step=1), identity)
    assert list(run.iterdir()) == []


@pytest.mark.fault(
    "storage",
    "the disk becomes full during training: at metrics.jsonl, the ledger, a trace or the final model",
    "the run ends with one message that names the path and the remedy; the checkpoints are intact",
)
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
