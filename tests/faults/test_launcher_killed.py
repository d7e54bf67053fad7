"""Proves runtime/parent.py: a torchrun that is killed leaves no process; a rank that a shell has started goes on."""

import multiprocessing
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.test_restarts import rendezvous
from tests.faults.torchrun import alive, children, family, kill, last_step, torchrun
from tests.launch import DEADLINE, PROCESSES, ROOT, _go_to_tree, train_ok

GONE = 30  # seconds on a busy machine for what must take 5


def start_rank(environment: dict[str, str], argv: list[str], log: str) -> None:
    """Be a launcher: the parent of a rank."""
    rank = multiprocessing.get_context("fork").Process(
        target=_go_to_tree, args=(ROOT, 0, {"WORLD_SIZE": "1", **environment}, argv, log, pickle.dumps(None))
    )
    rank.start()
    rank.join()


def until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it hung"
        time.sleep(0.01)


@pytest.mark.fault(
    "process",
    "torchrun is killed with SIGKILL",
    "no rank and no worker of a rank is left after 5 seconds, and a new torchrun continues the run",
)
@pytest.mark.parametrize("launcher", ["torchrun", "a shell"])
def test_parent_is_killed(tiny: list[object], tmp_path: Path, launcher: str) -> None:
    """The rank ends with torchrun. A rank that a shell has started, by hand, goes on."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*tiny, "--dataloader_num_workers", 1, "--save_steps", 5, "--output_dir", run]
    argv += ["--resume_from_checkpoint", "auto"]
    environment = {"TORCHELASTIC_RUN_ID": "none"} if launcher == "torchrun" else {}
    steps = ["--max_steps", 1000 if environment else 40]
    parent = PROCESSES.Process(target=start_rank, args=(environment, [str(word) for word in [*argv, *steps]], str(log)))
    parent.start()
    assert parent.pid
    until(lambda: last_step(run) >= 2 or not parent.is_alive())
    assert parent.is_alive(), log.read_text()
    processes = family(parent.pid)
    assert len(processes) >= 2  # the rank and a worker of its loader
    kill(parent.pid)
    until(lambda: not any(map(alive, processes)), GONE if environment else DEADLINE)
    if environment:
        assert 0 < last_step(run) < 1000
        assert "torchrun has ended without its ranks" in log.read_text()
        steps = ["--max_steps", last_step(run) + 5]
        train_ok(1, *argv, *steps)
    else:
        assert last_step(run) == 40
        assert "saved" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "tokenization", "step", "save"])
def test_torchrun_is_killed(tiny: list[object], train_file: Path, tmp_path: Path, moment: str) -> None:
    """The same with the real torchrun, two ranks and all their workers, at any moment; then torchrun starts again."""
    run, cache, text = tmp_path / "run", tmp_path / "cache", tmp_path / "text.jsonl"
    text.write_text(train_file.read_text() * (200 if moment == "tokenization" else 1))
    argv = [*tiny, "--train_file", text, "--data_cache_dir", cache, "--dataloader_num_workers", 1, "--save_steps", 2]
    argv += [
        "--preprocessing_num_workers",
        2,
        "--validation_split_percentage",
        0,
        "--output_dir",
        run,
        "--resume_from_checkpoint",
        "auto",
    ]
    flags = ["--nproc_per_node", 2, *rendezvous("static")]
    with torchrun(flags, [*argv, "--max_steps", 1000], tmp_path / "log") as launcher:
        launcher.until(lambda: len(launcher.ranks()) == 2)
        conditions: dict[str, Callable[[], object]] = {
            "start": lambda: True,
            "tokenization": lambda: any(map(children, launcher.ranks())) and list(cache.glob("*partial*")),
            "step": lambda: last_step(run) >= 3,
            "save": lambda: list(run.glob(".saving-*")),
        }
        launcher.until(conditions[moment])
        assert launcher.process.poll() is None, launcher.output()
        processes = family(launcher.process.pid)
        assert moment in ("start", "save") or len(processes) > 2, "the ranks have workers"
        kill(launcher.process.pid)
        until(lambda: not any(map(alive, processes)), GONE)
    last = max(0, last_step(run))
    assert last < 1000
    with torchrun(flags, [*argv, "--max_steps", last + 3], tmp_path / "again") as launcher:
        assert launcher.end() == 0, launcher.output()
    assert last_step(run) == last + 3
    assert "damaged" not in launcher.output()
