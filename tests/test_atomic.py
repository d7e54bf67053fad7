"""Proves checkpoint/save.py and files.py: an interrupted save leaves the previous checkpoint or the new one."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import checkpoint.save
from checkpoint.load import problems
from tests.launch import train, train_ok
from tests.test_resume import trajectory

# What changes the disk while a checkpoint is saved and the one before it is pruned.
CHANGES = [
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (os, "rename"),
    (Path, "write_text"),
]


def watch_second_save(act: Callable[[int], None]) -> None:
    """Call `act` just before each change that the next save makes to the disk, with its number, counted from 1."""
    write, seen, acting = checkpoint.save._write, 0, False

    def watched(original: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen, acting
            if not acting:  # the changes of `act` itself do not count
                acting, seen = True, seen + 1
                act(seen)
                acting = False
            return original(*args, **kwargs)

        return change

    def watched_write(snapshot: Any, options: Any, group: Any) -> None:
        for owner, name in CHANGES:
            setattr(owner, name, watched(getattr(owner, name)))
        write(snapshot, options, group)

    checkpoint.save._write = watched_write


def copy_before_each_change(run: Path, copies: Path) -> None:
    """Copy the directory of the run: what a process that is killed at this moment leaves on the disk."""

    def copy(event: int) -> None:
        shutil.copytree(run, copies / str(event))

    watch_second_save(copy)


def die_before_change(event: int, rank: int) -> None:
    """Let `rank` die just before change number `event` that its second save makes to the disk."""

    def die(seen: int) -> None:
        if seen == event:
            os._exit(9)

    if os.environ["RANK"] == str(rank):
        watch_second_save(die)


@pytest.fixture(scope="module")
def short(tiny: list[object]) -> list[object]:
    quick = ["--per_device_train_batch_size", 8, "--validation_split_percentage", 0, "--ddp_timeout", 20]
    return [*tiny, *quick, "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 1]


@pytest.fixture(scope="module")
def unbroken(short: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("unbroken")
    train_ok(1, *short, "--output_dir", output_dir, "--max_steps", 4)
    return output_dir


@pytest.fixture(scope="module")
def half_way(short: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, stopped when two are done and saved."""
    output_dir = tmp_path_factory.mktemp("half")
    outcome = train(1, [*short, "--output_dir", output_dir], before=die_after_first_save)
    assert outcome.exit_codes == [9], outcome.output
    assert problems(output_dir / "checkpoint-2") == []
    return output_dir


def die_after_first_save() -> None:
    write = checkpoint.save._write

    def write_and_die(snapshot: Any, options: Any, group: Any) -> None:
        write(snapshot, options, group)
        os._exit(9)

    checkpoint.save._write = write_and_die


def check_survived(run: Path, short: list[object], unbroken: Path) -> None:
    """Exactly one valid checkpoint is chosen, and the resumed run ends as the unbroken one did."""
    valid = [path for path in run.glob("checkpoint-*") if problems(path) == []]
    assert valid
    train_ok(1, *short, "--output_dir", run, "--resume_from_checkpoint", "auto")
    assert trajectory(run) == trajectory(unbroken)
    expected, actual = load_file(unbroken / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(actual[name].equal(expected[name]) for name in expected)
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-4"]
    assert list(run.glob(".saving-*")) == []


def contents(directory: Path) -> frozenset[tuple[str, bytes]]:
    """All paths below a directory, each with the bytes of its file."""
    paths = directory.rglob("*")
    return frozenset((str(path.relative_to(directory)), path.read_bytes() if path.is_file() else b"") for path in paths)


@pytest.mark.slow
@pytest.mark.fault(
    "process",
    "a kill before each change that a save makes to the disk",
    "the checkpoint before it or the new one is whole, and the run ends as an unbroken one",
)
def test_killed_at_every_change(short: list[object], half_way: Path, unbroken: Path, tmp_path: Path) -> None:
    """One process, stopped before each file is written or synced, before each rename and removal."""
    run, copies = tmp_path / "run", tmp_path / "copies"
    shutil.copytree(half_way, run)
    options = [*short, "--output_dir", run, "--resume_from_checkpoint", "auto"]
    outcome = train(1, options, before=partial(copy_before_each_change, run, copies))
    assert outcome.exit_codes == [0], outcome.output
    assert len(list(copies.iterdir())) > 15, "the patches must see what a save does"
    different = {contents(copy): copy for copy in copies.iterdir()}  # before a sync, the files are those after it
    assert len(different) > 8
    for copy in different.values():
        check_survived(copy, short, unbroken)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_killed(
    short: list[object], half_way: Path, unbroken: Path, tmp_path: Path, rank: int
) -> None:
    """The other rank fails by itself, within the timeout; the checkpoint before is intact."""
    run = tmp_path / "run"
    shutil.copytree(half_way, run)
    options = [*short, "--output_dir", run, "--resume_from_checkpoint", "auto"]
    outcome = train(2, options, before=partial(die_before_change, 2, rank))
    assert outcome.exit_codes[rank] == 9, outcome.output
    assert outcome.exit_codes[1 - rank] not in (0, 9)
    assert problems(run / "checkpoint-2") == []
    assert not (run / "checkpoint-4").exists()
