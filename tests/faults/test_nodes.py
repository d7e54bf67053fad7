"""Proves that training on two nodes is training on one, and what happens when a node or the network fails."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from metrics.records import read_records
from tests.faults.nodes import DEADLINE, Launchers, Nodes, exit_codes, not_permitted, on_nodes, two_nodes
from tests.launch import ROOT, train, train_ok
from tests.test_resume import STEADY, equal_to_the_bit, trajectory

pytestmark = pytest.mark.skipif(bool(not_permitted()), reason=not_permitted())

RESUME = ["--resume_from_checkpoint", "auto"]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path / "nodes") as nodes:
        yield nodes


def train_on(nodes: Nodes, argv: list[object], **variables: str) -> None:
    outcome = train(4, argv, before=on_nodes(nodes, variables))
    assert outcome.exit_codes == [0] * 4, outcome.output


def assert_identical(run: Path, reference: Path, step: int) -> None:
    """The curve, the last checkpoint and the exported model of two runs, to the bit."""
    assert trajectory(run) == trajectory(reference)
    assert equal_to_the_bit(run / f"checkpoint-{step}", reference / f"checkpoint-{step}")
    digests = [hashlib.sha256((path / "model.safetensors").read_bytes()) for path in (run, reference)]
    assert digests[0].digest() == digests[1].digest()


@pytest.mark.fault("distributed", "two nodes of two ranks", "the run of one node with four ranks, to the bit")
@pytest.mark.fault("distributed", "a host name without an address, as in containers", "the nodes train together")
def test_two_nodes_are_one(tiny: list[object], tmp_path: Path, nodes: Nodes) -> None:
    for node in nodes.nodes:
        node.set_hosts({})
    options = [*tiny, "--max_steps", 4, "--strategy", "fsdp"]
    train_on(nodes, [*options, "--output_dir", tmp_path / "two"])
    train_ok(4, *options, "--output_dir", tmp_path / "one")
    assert_identical(tmp_path / "two", tmp_path / "one", 4)


@pytest.mark.slow
@pytest.mark.fault(
    "distributed", "a run moves between one node and two", "it resumes, and its curve is the unbroken one"
)
@pytest.mark.parametrize("strategy", ["ddp", "ddp --shard_optimizer", "fsdp", "fsdp --replicas 2"])
def test_resume_on_other_nodes(tiny: list[object], tmp_path: Path, nodes: Nodes, strategy: str) -> None:
    """With replicas, each group of equal shards has a rank on each node."""
    options = [*tiny, *STEADY, "--strategy", *strategy.split(), *RESUME]
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    train_ok(4, *options, "--output_dir", unbroken, "--max_steps", 9)
    train_on(nodes, [*options, "--output_dir", run, "--max_steps", 3])
    train_ok(4, *options, "--output_dir", run, "--max_steps", 6)
    train_on(nodes, [*options, "--output_dir", run, "--max_steps", 9])
    steps = [[row for row in trajectory(path) if "loss" in row] for path in (run, unbroken)]  # without evaluations
    assert steps[0] == steps[1]
    assert equal_to_the_bit(run / "checkpoint-9", unbroken / "checkpoint-9")
    assert (run / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def long(tiny: list[object]) -> list[object]:
    """A run that saves often, for faults amid its steps."""
    often = ["--save_steps", 10, "--save_total_limit", 2, "--eval_steps", 100]
    return [*tiny, "--max_steps", 150, "--strategy", "fsdp", *often, "--ddp_timeout", 10, *RESUME]


@pytest.fixture(scope="module")
def unbroken(long: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one node."""
    path = tmp_path_factory.mktemp("unbroken")
    train_ok(4, *long, "--output_dir", path)
    return path


def wait_for_step(run: Path, step: int, launchers: Launchers, nodes: Nodes) -> None:
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + DEADLINE
    while not any(row["step"] >= step for row in read_records(run / "metrics.jsonl")):
        assert all(launcher.poll() is None for launcher in launchers), nodes.log()
        assert time.monotonic() < deadline, nodes.log()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.fault(
    "distributed", "a node is lost", "the others end; the same commands continue the run when it is back"
)
@pytest.mark.parametrize(
    ("rendezvous", "lost"), [("static", 0), ("static", 1), ("c10d", 0), ("c10d", 1)], ids=lambda value: str(value)
)
def test_a_node_is_lost(
    long: list[object], unbroken: Path, tmp_path: Path, nodes: Nodes, rendezvous: str, lost: int
) -> None:
    run = tmp_path / "run"
    launchers = nodes.torchrun(rendezvous, [*long, "--output_dir", run])
    wait_for_step(run, 30, launchers, nodes)
    nodes.nodes[lost].end()
    assert exit_codes(launchers)[1 - lost] == 1, nodes.log()
    assert nodes.nodes[1 - lost].processes() == []
    assert not (run / "model.safetensors").exists(), "it has ended before the fault"
    nodes.boot(lost)
    assert exit_codes(nodes.torchrun(rendezvous, [*long, "--output_dir", run])) == [0, 0], nodes.log()
    assert_identical(run, unbroken, 150)


@pytest.mark.slow
@pytest.mark.fault("distributed", "the first node starts more than a minute after the others", "they wait for it")
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_node_starts_late(tiny: list[object], tmp_path: Path, nodes: Nodes, rendezvous: str) -> None:
    """It holds the store. By default, torch waits for a minute with c10d (docs/launch.md)."""
    argv = [*tiny, "--max_steps", 2, "--output_dir", tmp_path / "run"]
    early = nodes.torchrun_on(1, rendezvous, argv)
    with suppress(subprocess.TimeoutExpired):
        early.wait(80)
    assert early.poll() is None, nodes.log()
    assert exit_codes([nodes.torchrun_on(0, rendezvous, argv), early]) == [0, 0], nodes.log()


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "the link between two nodes is cut",
    "all ranks and launchers end; the same commands continue the run later",
)
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_the_link_is_cut(long: list[object], unbroken: Path, tmp_path: Path, nodes: Nodes, rendezvous: str) -> None:
    """With c10d, torch's agent waits for the store, until the system gives the connection up (docs/launch.md)."""
    run = tmp_path / "run"
    if rendezvous == "c10d":
        nodes.nodes[1].call("sysctl", "--write", "net.ipv4.tcp_retries2=6")  # 25 seconds; 15 minutes by default
    launchers = nodes.torchrun(rendezvous, [*long, "--output_dir", run])
    wait_for_step(run, 30, launchers, nodes)
    nodes.cut()
    assert exit_codes(launchers) == [1, 1], nodes.log()
    assert [node.processes() for node in nodes.nodes] == [[], []]
    nodes.mend()
    assert exit_codes(nodes.torchrun(rendezvous, [*long, "--output_dir", run])) == [0, 0], nodes.log()
    assert_identical(run, unbroken, 150)


@pytest.mark.slow
@pytest.mark.fault("distributed", "the clock of a node is an hour ahead", "nothing changes: steps decide, not times")
def test_clocks_differ(long: list[object], unbroken: Path, tmp_path: Path, nodes: Nodes) -> None:
    """The node of rank 0 is ahead first, then behind; and the files of an older checkpoint are newer.

    With static rendezvous: torch's c10d rendezvous compares the clocks of nodes (docs/launch.md).
    """
    run, clock = tmp_path / "run", build_clock(tmp_path)
    argv = [*long, "--output_dir", run]
    launchers = nodes.torchrun("static", argv, LD_PRELOAD=clock, SECONDS_AHEAD=("3600", "0"))
    wait_for_step(run, 50, launchers, nodes)
    nodes.end()
    older, newer = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]
    for path in older.rglob("*"):
        os.utime(path, (time.time() + 7200, time.time() + 7200))
    nodes.boot(0)
    nodes.boot(1)
    launchers = nodes.torchrun("static", argv, LD_PRELOAD=clock, SECONDS_AHEAD=("0", "3600"))
    assert exit_codes(launchers) == [0, 0], nodes.log()
    assert f"resumed from {newer}" in nodes.log()
    assert_identical(run, unbroken, 150)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-140", "checkpoint-150"]


def build_clock(directory: Path) -> str:
    """A library for LD_PRELOAD that lets the clocks of a process be SECONDS_AHEAD."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler for a clock that is ahead")
    (directory / "clock.c").write_text(CLOCK)
    library = directory / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, directory / "clock.c", "-ldl"], check=True)
    return str(library)


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += atol(getenv("SECONDS_AHEAD"));
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  now->tv_sec = time.tv_sec, now->tv_usec = time.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *seconds) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return seconds ? *seconds = now.tv_sec : now.tv_sec;
}
"""


@pytest.mark.slow
@pytest.mark.fault("distributed", "packets between nodes need 50 ms", "the curve is that of one node")
def test_slow_link(tiny: list[object], tmp_path: Path) -> None:
    options = [*tiny, "--max_steps", 4, "--strategy", "fsdp"]
    with two_nodes(tmp_path / "nodes", delay=0.05) as nodes:
        train_on(nodes, [*options, "--output_dir", tmp_path / "two"])
    train_ok(4, *options, "--output_dir", tmp_path / "one")
    assert_identical(tmp_path / "two", tmp_path / "one", 4)


def add_island(nodes: Nodes) -> None:
    """Give each node a second network, from which it reaches nothing, and the address of its host name there."""
    for number, node in enumerate(nodes.nodes):
        node.call("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "nothing")
        node.call("ip", "address", "add", f"10.88.{number}.1/24", "dev", "eth1")
        node.call("ip", "link", "set", "eth1", "up")
        node.call("ip", "link", "set", "nothing", "up")
        node.set_hosts({node.name: f"10.88.{number}.1"})


def use_debian(nodes: Nodes) -> None:
    """Debian's installer gives the host name a loopback address."""
    for node in nodes.nodes:
        node.set_hosts({node.name: "127.0.1.1"})


def use_version_6(nodes: Nodes) -> None:
    """Leave the nodes with IPv6 alone, and without names."""
    for number, node in enumerate(nodes.nodes):
        node.call("ip", "address", "add", f"fd77::{number + 1}/64", "dev", "eth0", "nodad")
        node.call("ip", "-4", "address", "flush", "dev", "eth0")
        node.address = f"fd77::{number + 1}"
        node.set_hosts({})


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "a node with several networks, a host name with a loopback address, IPv6 alone",
    "gloo uses the network that reaches MASTER_ADDR",
)
@pytest.mark.parametrize("change", [add_island, use_debian, use_version_6])
def test_networks(tiny: list[object], tmp_path: Path, nodes: Nodes, change: Callable[[Nodes], None]) -> None:
    change(nodes)
    launchers = nodes.torchrun("static", [*tiny, "--max_steps", 2, "--output_dir", tmp_path / "run"])
    assert exit_codes(launchers) == [0, 0], nodes.log()


@pytest.mark.slow
@pytest.mark.fault(
    "distributed", "GLOO_SOCKET_IFNAME names a network that does not reach the other nodes", "a message with the remedy"
)
@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("eth1", "GLOO_SOCKET_IFNAME eth1: gloo cannot reach the other ranks from its address: "),
        ("eth7", "GLOO_SOCKET_IFNAME eth7: node0 has no such network interface\nset GLOO_SOCKET_IFNAME"),
    ],
)
def test_wrong_interface(tiny: list[object], tmp_path: Path, nodes: Nodes, interface: str, message: str) -> None:
    add_island(nodes)
    argv = [*tiny, "--max_steps", 2, "--output_dir", tmp_path / "run", "--ddp_timeout", 3]
    outcome = train(4, argv, before=on_nodes(nodes, {"GLOO_SOCKET_IFNAME": interface}))
    assert outcome.exit_codes == [2] * 4, outcome.output
    assert message in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.fault("storage", "output_dir is on a disk of each node", "refused before the first step")
def test_output_dir_is_not_shared(tiny: list[object], tmp_path: Path, nodes: Nodes, left: bool) -> None:
    """Also if node 1 has there what an earlier run left."""
    run = tmp_path / "run"
    run.mkdir()
    nodes.nodes[1].call("mount", "-t", "tmpfs", "none", run)
    if left:
        nodes.nodes[1].call("touch", run / ".lock")
    argv = [*tiny, "--max_steps", 2, "--output_dir", run]
    outcome = train(4, argv, before=on_nodes(nodes))
    assert outcome.exit_codes == [2] * 4, outcome.output
    assert f"output_dir {run}: ranks [2, 3] and rank 0 do not see what the other writes there" in outcome.output
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.fault("storage", "a second run on the same output_dir, on another node", "refused before it starts")
def test_second_run_on_another_node(tiny: list[object], tmp_path: Path, nodes: Nodes) -> None:
    command = [sys.executable, ROOT / "train.py", *tiny, "--max_steps", 100000, "--output_dir", tmp_path / "run"]
    first = nodes.nodes[0].start(*command)
    wait_for_step(tmp_path / "run", 1, [first], nodes)
    second = nodes.nodes[1].start(*command)
    assert exit_codes([second]) == [2], nodes.log()
    assert "another run writes to it" in nodes.nodes[1].log
    assert first.poll() is None
