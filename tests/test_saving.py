"""Proves checkpoint/save.py: a checkpoint has the bytes of its step while training continues; failures are reported."""

import json
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import checkpoint.save
from checkpoint.load import problems
from checkpoint.save import Saver
from metrics.records import read_records
from tests.kills import at_line
from tests.launch import train, train_ok
from tests.test_resume import STEADY, equal_to_the_bit, trajectory

RESUME = ["--resume_from_checkpoint", "auto"]


def write_late(output_dir: Path, step: int) -> None:
    """Patch a rank: no checkpoint is written before metrics.jsonl tells of `step`, or of the end of training."""
    write = checkpoint.save._write

    def late(snapshot: Any, options: Any, group: Any) -> None:
        while not [row for row in read_records(output_dir / "metrics.jsonl") if row["step"] >= step]:
            time.sleep(0.01)
        write(snapshot, options, group)

    checkpoint.save._write = late


@pytest.mark.fault(
    "storage",
    "training continues while a checkpoint is written",
    "its bytes are those of the saved step",
)
@pytest.mark.parametrize(
    "topology",
    [
        ["--strategy", "fsdp"],
        pytest.param(["--strategy", "ddp"], marks=pytest.mark.slow),
        pytest.param(["--shard_optimizer"], marks=pytest.mark.slow),
    ],
)
def test_the_bytes_are_those_of_the_saved_step(tiny: list[object], tmp_path: Path, topology: list[object]) -> None:
    """A checkpoint that is written while training continues for four steps equals one that is written at once."""
    options = [*tiny, *topology, "--max_steps", 12, "--save_steps", 5, "--lr_scheduler_type", "constant_with_warmup"]
    late, at_once = tmp_path / "late", tmp_path / "at_once"
    outcome = train(2, [*options, "--output_dir", late], before=partial(write_late, late, 9))
    assert outcome.exit_codes == [0, 0], outcome.output
    train_ok(2, *options, "--output_dir", at_once, "--async_save", "false")
    assert trajectory(late) == trajectory(at_once)
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-12"):
        assert equal_to_the_bit(late / name, at_once / name)


def test_save_steps_0_writes_no_checkpoint(tiny: list[object], tmp_path: Path) -> None:
    train_ok(1, *tiny, "--max_steps", 3, "--save_steps", 0, "--output_dir", tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "model.safetensors").exists()


def test_the_next_save_waits_for_the_last(tiny: list[object], tmp_path: Path) -> None:
    """Five checkpoints, each written slowly: all are there, whole, and pruned in their order."""
    options = [*tiny, "--max_steps", 5, "--save_steps", 1, "--save_total_limit", 3, "--output_dir", tmp_path]
    outcome = train(2, options, before=write_slowly)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (3, 4, 5)]
    assert all(problems(path) == [] for path in tmp_path.glob("checkpoint-*"))


def write_slowly() -> None:
    write = checkpoint.save._write

    def slowly(snapshot: Any, options: Any, group: Any) -> None:
        time.sleep(0.2)
        write(snapshot, options, group)

    checkpoint.save._write = slowly


def small_files_only(rank: int) -> None:
    """Let no file of `rank` grow beyond 20 KiB, as if the disk were full; SIGXFSZ is ignored by Python, write fails."""
    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, 20 * 1024))


@pytest.mark.slow
@pytest.mark.fault(
    "storage",
    "the disk of one rank is full at a checkpoint",
    "all ranks end with one message; the checkpoint before it is intact, and resumes to the bit",
)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failed_write_is_reported(tiny: list[object], tmp_path: Path, asynchronous: str) -> None:
    """The disk of one rank is full: all ranks end, and one message names the directory."""
    run = tmp_path / "run"
    options = [*tiny, *STEADY, "--save_steps", 4, "--output_dir", run, "--async_save", asynchronous]
    train_ok(2, *options, "--max_steps", 4)
    before = (run / "checkpoint-4" / "manifest.json").read_bytes()
    outcome = train(2, [*options, *RESUME, "--max_steps", 400], before=partial(small_files_only, 1))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert f"output_dir {run}: the checkpoint could not be written: [Errno 27] File too large" in outcome.output
    assert read_records(run / "metrics.jsonl")[-1]["step"] < 400
    assert (run / "checkpoint-4" / "manifest.json").read_bytes() == before
    assert problems(run / "checkpoint-4") == []
    assert not (run / "checkpoint-8").exists()
    train_ok(2, *options, *RESUME, "--max_steps", 8)
    train_ok(2, *options[:-4], "--output_dir", tmp_path / "unbroken", "--max_steps", 8)
    assert equal_to_the_bit(run / "checkpoint-8", tmp_path / "unbroken" / "checkpoint-8")


@pytest.mark.fault(
    "process",
    "SIGTERM to one rank in an evaluation or in a save",
    "all ranks end with a valid checkpoint of this step, and the resumed run is the unbroken one",
)
@pytest.mark.parametrize(
    ("file", "line", "count"),
    [
        # 8: of the evaluation after step 5; the one before training has 6 batches
        pytest.param("loss/evaluation.py", "totals[0] +=", 8, marks=pytest.mark.slow),
        ("checkpoint/save.py", "saving.rename(final)", 1),
    ],
    ids=["evaluation", "save"],
)
def test_stopped_in_an_evaluation_or_a_save(
    tiny: list[object], tmp_path: Path, file: str, line: str, count: int
) -> None:
    """One rank gets SIGTERM in an evaluation or a save: all ranks end, and resume from a valid checkpoint."""
    run = tmp_path / "run"
    options = [*tiny, "--lr_scheduler_type", "constant_with_warmup"]
    options += ["--eval_steps", 5, "--save_steps", 10, "--logging_steps", 1]
    argv = [*options, "--output_dir", run, "--max_steps", 400]
    outcome = train(2, argv, before=partial(terminate_at, file, line, count))
    assert outcome.exit_codes == [128 + signal.SIGTERM] * 2, outcome.output
    checkpoints = sorted(run.glob("checkpoint-*"))
    assert all(problems(path) == [] for path in checkpoints)
    assert list(run.glob(".saving-*")) == []
    last = max(int(path.name.split("-")[1]) for path in checkpoints)
    assert read_records(run / "metrics.jsonl")[-1]["step"] == last < 60
    train_ok(2, *options, *RESUME, "--output_dir", run, "--max_steps", last + 10)
    train_ok(2, *options, "--output_dir", tmp_path / "undisturbed", "--max_steps", last + 10)
    name = f"checkpoint-{last + 10}"
    assert equal_to_the_bit(run / name, tmp_path / "undisturbed" / name)


def terminate_at(file: str, line: str, count: int) -> None:
    at_line(file, line, count, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))


def watch_directories(output_dir: Path, report: Path) -> None:
    """Patch rank 0: after each change to the disk, note how many checkpoints there are, and how many whole ones."""

    def watched(change: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            result = change(*args, **kwargs)
            names = list(output_dir.glob("checkpoint-*"))
            whole = [path for path in names if (path / "manifest.json").exists()]
            with open(report, "a") as file:
                file.write(json.dumps([len(names), len(whole)]) + "\n")
            return result

        return changed

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, watched(getattr(os, name)))


@pytest.mark.fault(
    "storage",
    "100 saves with `--save_total_limit 2`",
    "never more than three checkpoints, and at every moment a complete one",
)
@pytest.mark.parametrize("saves", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_many_saves_that_keep_two(tiny: list[object], tmp_path: Path, saves: int) -> None:
    """There are never more than three checkpoints, and after the first save always a complete one."""
    run, report = tmp_path / "run", tmp_path / "report"
    options = [*tiny, "--max_steps", saves, "--save_steps", 1, "--save_total_limit", 2, "--output_dir", run]
    outcome = train(1, options, before=partial(watch_directories, run, report))
    assert outcome.exit_codes == [0], outcome.output
    seen = [json.loads(line) for line in report.read_text().splitlines()]
    assert max(directories for directories, _ in seen) == 3
    first = next(index for index, (_, whole) in enumerate(seen) if whole)
    assert min(whole for _, whole in seen[first:]) == 1
    assert len(seen) > 5 * saves
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{saves - 1}", f"checkpoint-{saves}"}


def test_the_share_of_each_rank(tiny: list[object], tmp_path: Path) -> None:
    """Replicated tensors are written once, in about equal fractions by all ranks."""
    train_ok(4, *tiny, "--output_dir", tmp_path, "--max_steps", 1, "--per_device_train_batch_size", 1)
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint-1" / "optimizer").iterdir()]
    assert len(sizes) == 4
    assert max(sizes) < 1.5 * min(sizes)


def no_fork_after_the_first_save() -> None:
    """Patch a rank: once a thread may be saving, a fork is an error."""
    save = Saver.save

    def fork() -> int:
        raise AssertionError("a fork beside the saving thread")

    def save_and_forbid(*arguments: Any) -> None:
        save(*arguments)
        os.fork = fork

    setattr(Saver, "save", save_and_forbid)  # noqa: B010


@pytest.mark.slow
def test_no_worker_is_forked_beside_the_saving_thread(tiny: list[object], tmp_path: Path) -> None:
    """A forked process inherits the locks that other threads hold, and may wait for one for ever: it did."""
    options = [*tiny, "--global_batch_size", 48, "--per_device_train_batch_size", 12, "--max_steps", 40]
    options += ["--save_steps", 3, "--eval_steps", 4, "--dataloader_num_workers", 2, "--output_dir", tmp_path]
    outcome = train(2, options, before=no_fork_after_the_first_save)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert read_records(tmp_path / "metrics.jsonl")[-1]["epoch"] > 2
