"""Proves runtime/peers.py: what fails on one node alone ends the ranks of the other nodes, and they say what it was."""

import os
import re
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import cast

import pytest
import torch.distributed as dist

import data.prepare
from runtime import peers
from tests.faults.test_restarts import rendezvous
from tests.faults.torchrun import torchrun
from tests.launch import train

HOST = socket.gethostname()


def wrong_option(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        sys.argv += ["--learning_rate", "fast"]


def full_disk(rank: int) -> None:
    fail(rank, OSError(28, "No space left on device", "/cache/tokens.bin"))


def out_of_host_memory(rank: int) -> None:
    fail(rank, MemoryError("cannot allocate 3 GB"))


def fail(rank: int, error: Exception) -> None:
    """Let the preparation of data fail on `rank` alone. Elsewhere it would be another node's disk or memory."""
    if os.environ["RANK"] == str(rank):

        def cannot(*arguments: object, **options: object) -> None:
            raise error

        data.prepare.find_sources = cannot  # type: ignore[assignment]


@pytest.mark.fault(
    "distributed",
    "an option is wrong on one node alone, or its disk or memory is full while data is prepared",
    "the ranks of the other nodes end within 15 seconds and say which rank failed, where, and why",
)
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize(
    ("fault", "exit_code", "message"),
    [
        (wrong_option, 2, "argument --learning_rate: invalid float value: 'fast'"),
        pytest.param(full_disk, 2, "/cache/tokens.bin: No space left on device", marks=pytest.mark.slow),
        pytest.param(out_of_host_memory, 1, "MemoryError: cannot allocate 3 GB", marks=pytest.mark.slow),
    ],
)
def test_rank_that_fails_before_it_meets_the_others(
    tiny: list[object], tmp_path: Path, fault: object, exit_code: int, message: str, rank: int
) -> None:
    """No torchrun ends the other rank here, as if it were on another node."""
    assert callable(fault)
    outcome = train(2, [*tiny, "--output_dir", tmp_path / "run"], before=partial(fault, rank))
    assert outcome.exit_codes == [exit_code] * 2, outcome.output
    if rank == 1:  # in launch.py, ranks share a node: LOCAL_RANK 0 of each node says it
        assert f"train.py: error: rank 1 on {HOST}: {message}" in outcome.output
    assert message in outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "c10d"])
@pytest.mark.parametrize("node", [0, 1])
def test_node_with_a_wrong_option(tiny: list[object], tmp_path: Path, kind: str, node: int) -> None:
    """Two torchruns of one rank each, as on two nodes."""
    flags = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_id", "nodes", *rendezvous(kind)]
    argv = [*tiny, "--output_dir", tmp_path / "run"]
    wrong = [[*argv, "--learning_rate", "fast"] if node == each else argv for each in (0, 1)]
    logs = [tmp_path / str(each) for each in (0, 1)]
    with (
        torchrun([*flags, "--node_rank", 0], wrong[0], logs[0]) as first,
        torchrun([*flags, "--node_rank", 1], wrong[1], logs[1]) as second,
    ):
        assert [first.end(), second.end()] == [1, 1]
    outputs = [log.read_text() for log in logs]
    assert "train.py: error: argument --learning_rate: invalid float value: 'fast'" in outputs[node]
    # With c10d, torchrun numbers the nodes as they come.
    assert re.search(rf"train.py: error: rank [01] on {HOST}: argument --learning_rate: invalid", outputs[1 - node])


class Silent:
    """A store on a node that is cut off: it does not answer, as long as the system keeps the connection."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *arguments: Event().wait()  # for ever


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails asks and tells the others, but does not wait for such a store."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(peers, "RECONNECT", timedelta(seconds=0.1))
    monkeypatch.setattr(peers, "LINGER", 0.1)
    monkeypatch.setattr(peers.Peers, "_watch", lambda self: None)
    rank = peers.Peers()
    rank.watched, rank.group = cast(dist.Store, Silent()), "group"
    rank.connected.set()
    rank.end_if_signaled()
    assert not rank.heard
    rank.report("the disk is full", exit_code=2)
    assert rank.failing
    rank.linger()
