"""Proves runtime/peers.py: torchrun restarts the ranks of a run in which one was killed, and they meet again."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests.faults.nodes import DEADLINE, exit_codes, not_permitted, two_nodes
from tests.faults.torchrun import alive, children, kill, last_step, torchrun
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
    argv = [*tiny, "--max_steps", STEPS, "--save_steps", 3, "--save_total_limit", 2, "--dataloader_num_workers", 1]
    train_ok(2, *argv, "--output_dir", tmp_path / "unbroken")
    run = tmp_path / "run"
    flags = ["--nproc_per_node", 2, "--max-restarts", KILLS, *rendezvous(kind)]
    argv = [*argv, "--data_cache_dir", tmp_path / "cache", "--output_dir", run, "--resume_from_checkpoint", "auto"]
    with torchrun(flags, argv, tmp_path / "log") as launcher:
        old = kill_ranks(seed, run, 2, launcher.ranks, launcher.until, launcher.output)
        assert launcher.end() == 0, f"seed {seed}\n{launcher.output()}"
        assert "damaged" not in launcher.output()
        assert not any(alive(rank) for rank in old)
    assert_unbroken(run, tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(not_permitted()), reason=not_permitted())
@pytest.mark.fault(
    "process",
    "ranks of two nodes are killed 20 times under torchrun --max-restarts: one, those of a node, or all",
    "20 restarts recover, with static and c10d rendezvous, and the curve is that of an unbroken run",
)
@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_twenty_kills_on_two_nodes(tiny: list[object], tmp_path: Path, kind: str) -> None:
    """Each torchrun sees only its own ranks die, and counts its own restarts. With FSDP, a resume is exact."""
    seed = random.randrange(10**6)
    print("seed", seed)
    argv = [*tiny, "--strategy", "fsdp", "--max_steps", STEPS, "--save_steps", 3, "--save_total_limit", 2]
    train_ok(4, *argv, "--output_dir", tmp_path / "unbroken")
    run = tmp_path / "run"
    argv = [*argv, "--output_dir", run, "--resume_from_checkpoint", "auto"]
    with two_nodes(tmp_path / "nodes") as nodes:
        launchers = nodes.torchrun(kind, argv, "--max-restarts", KILLS)

        def ranks() -> list[int]:
            agents = [child for launcher in launchers for child in children(launcher.pid)]
            return [rank for agent in agents for rank in children(agent)]

        def until(condition: Callable[[], object]) -> None:
            deadline = time.monotonic() + DEADLINE
            while not condition():
                assert all(launcher.poll() is None for launcher in launchers), f"seed {seed}: it ended\n{nodes.log()}"
                assert time.monotonic() < deadline, f"seed {seed}: it hung\n{nodes.log()}"
                time.sleep(0.01)

        kill_ranks(seed, run, 4, ranks, until, nodes.log)
        assert exit_codes(launchers) == [0, 0], f"seed {seed}\n{nodes.log()}"
        assert "damaged" not in nodes.log()
        assert [node.processes() for node in nodes.nodes] == [[], []]
    assert_unbroken(run, tmp_path / "unbroken")


def kill_ranks(
    seed: int,
    run: Path,
    size: int,
    ranks: Callable[[], list[int]],
    until: Callable[[Callable[[], object]], None],
    output: Callable[[], str],
) -> list[int]:
    """Kill one rank, two ranks or all, 20 times, at moments that the seed draws. Returns the last ranks.

    `until` waits for a condition, and for the end of the launcher.
    """
    draw = random.Random(seed)
    victims: list[int] = []
    for number in range(KILLS):
        # A rank of another node goes on, if it still waits in its start for the one that was killed.
        until(lambda: len(ranks()) == size and not set(ranks()) & set(victims))  # noqa: B023
        step = last_step(run)
        moment = "export" if number == KILLS - 1 else draw.choice(["start", "step", "save"])
        if moment == "start":
            time.sleep(draw.uniform(0, 8))
        elif moment == "step":
            aim = step + draw.randrange(1, 4)
            until(lambda: last_step(run) >= aim)  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
        elif moment == "save":
            left = {*run.glob(".saving-*")}  # by a killed save
            until(lambda: {*run.glob(".saving-*")} - left)  # noqa: B023
            time.sleep(draw.uniform(0, 0.02))
        else:
            until(lambda: list(run.glob(".exporting-*")))
        living = ranks()
        assert living, f"seed {seed}: no ranks at kill {number}\n{output()}"
        first, half = draw.randrange(len(living)), size // 2
        victims = draw.choice([living[first : first + 1], living[:half], living[-half:], living])
        print(number, moment, "at step", last_step(run), "ranks", [living.index(victim) for victim in victims])
        for victim in victims:
            kill(victim)
    return living


def assert_unbroken(run: Path, unbroken: Path) -> None:
    """The curve, the last checkpoint and the exported model are those of the unbroken run, and nothing else is left."""
    assert trajectory(run) == trajectory(unbroken)
    assert equal_to_the_bit(run / f"checkpoint-{STEPS}", unbroken / f"checkpoint-{STEPS}")
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, unbroken))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not [*run.glob(".saving-*"), *run.glob(".exporting-*")]
