"""Proves runtime/peers.py: torchrun restarts the ranks of a run in which one was killed, and they meet again."""

import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests.faults.torchrun import alive, kill, last_step, torchrun
from tests.launch import Ranks, host_store, train, train_ok
from tests.test_resume import equal_to_the_bit, trajectory

STEPS, KILLS = 120, 20


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def rendezvous(kind: str) -> list[object]:
    """The options of torchrun for one node."""
    kinds: dict[str, list[object]] = {
        "static": ["--master_addr", "localhost", "--master_port", free_port()],
        "standalone": ["--standalone"],
        "c10d": ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"],
    }
    return kinds[kind]


def come_late() -> None:
    """Let rank 1 enter the process group a little later, so rank 0 reads the address that its predecessor has left."""
    if os.environ["RANK"] == "1":
        enter = dist.init_process_group

        def wait_and_enter(*arguments: Any, **options: Any) -> None:
            threading.Event().wait(1)
            enter(*arguments, **options)

        dist.init_process_group = wait_and_enter


@pytest.mark.fault(
    "process",
    "a rank is killed with SIGKILL, and its launcher starts all ranks again with the store of the killed ones",
    "the ranks meet, and the run ends with the curve of an unbroken run",
)
def test_killed_and_restarted(tiny: list[object], tmp_path: Path) -> None:
    """The ranks meet in a store that is full of addresses of dead ranks, as torchrun leaves it."""
    argv = [*tiny, "--max_steps", 6, "--save_steps", 2, "--ddp_timeout", 30]
    train_ok(2, *argv, "--output_dir", tmp_path / "unbroken")
    argv, store = [*argv, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto"], host_store()

    def kill_all(ranks: Ranks) -> None:
        while ranks[0].is_alive() and last_step(tmp_path / "run") < 3:
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()

    outcome = train(2, argv, meanwhile=kill_all, store=store)
    assert outcome.exit_codes == [-signal.SIGKILL] * 2, outcome.output
    outcome = train(2, argv, before=come_late, store=store)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(
    "process",
    "one rank or all are killed 20 times under torchrun --max-restarts: in their start, a step, a save, the export",
    "20 restarts recover, with static and c10d rendezvous, and the curve is that of an unbroken run",
)
@pytest.mark.parametrize("kind", ["static", "standalone", "c10d"])
def test_twenty_kills(tiny: list[object], tmp_path: Path, kind: str) -> None:
    """20 kills of one or of both ranks: during their start, a step, a save, and the export; then the unbroken curve."""
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    argv = [*tiny, "--max_steps", STEPS, "--save_steps", 3, "--save_total_limit", 2, "--dataloader_num_workers", 1]
    train_ok(2, *argv, "--output_dir", tmp_path / "unbroken")
    run = tmp_path / "run"
    flags = ["--nproc_per_node", 2, "--max-restarts", KILLS, *rendezvous(kind)]
    argv = [*argv, "--data_cache_dir", tmp_path / "cache", "--output_dir", run, "--resume_from_checkpoint", "auto"]
    with torchrun(flags, argv, tmp_path / "log") as launcher:
        old: list[int] = []
        for number in range(KILLS):
            launcher.until(lambda: len(ranks := launcher.ranks()) == 2 and not set(ranks) & set(old))  # noqa: B023
            old, step = launcher.ranks(), last_step(run)
            moment = "export" if number == KILLS - 1 else draw.choice(["start", "step", "save"])
            if moment == "start":
                time.sleep(draw.uniform(0, 8))
            elif moment == "step":
                aim = step + draw.randrange(1, 4)
                launcher.until(lambda: last_step(run) >= aim)  # noqa: B023
                time.sleep(draw.uniform(0, 0.1))
            elif moment == "save":
                left = {*run.glob(".saving-*")}  # by a killed save
                launcher.until(lambda: {*run.glob(".saving-*")} - left)  # noqa: B023
                time.sleep(draw.uniform(0, 0.02))
            else:
                launcher.until(lambda: list(run.glob(".exporting-*")))
            victims = draw.choice([old[:1], old[1:], old])
            print(number, moment, "at step", last_step(run), "ranks", [old.index(victim) for victim in victims])
            assert launcher.process.poll() is None, f"seed {seed}: it ended before kill {number}\n{launcher.output()}"
            for victim in victims:
                kill(victim)
        assert launcher.end() == 0, f"seed {seed}\n{launcher.output()}"
        assert "damaged" not in launcher.output()
        assert not any(alive(rank) for rank in old)
    unbroken = tmp_path / "unbroken"
    assert trajectory(run) == trajectory(unbroken)
    assert equal_to_the_bit(run / f"checkpoint-{STEPS}", unbroken / f"checkpoint-{STEPS}")
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, unbroken))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not [*run.glob(".saving-*"), *run.glob(".exporting-*")]
