"""Proves runtime/parent.py: a torchrun that is killed leaves no process, and other parents may end before their child."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metrics.records import read_records
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


def until(condition: object, seconds: float = DEADLINE) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
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
