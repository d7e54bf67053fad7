"""Proves runtime/hang/waiting.py and runtime/peers.py: before the ranks have met, a message says who is waited for."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from runtime.hang import waiting
from runtime.peers import INTERVAL
from tests.kills import at_line
from tests.launch import ROOT, Ranks, train

HOST = re.escape(socket.gethostname())


def speak_early(said: Path) -> None:
    """Patch a rank: messages come after a second, and then it creates the file `said`."""
    waiting.PATIENCE = 1.0

    def noted(*words: object, **keywords: object) -> None:
        print(*words, **keywords)  # type: ignore[call-overload]
        said.touch()

    waiting.print = noted  # type: ignore[attr-defined]


def hold(said: Path, rank: int, how: signal.Signals | None) -> None:
    """Patch the ranks: one gets no further than the build of its model, or is stopped there."""
    speak_early(said)

    def act() -> None:
        time.sleep(2 * INTERVAL)  # its thread tells where it is
        if how:
            os.kill(os.getpid(), how)
        threading.Event().wait(170)

    at_line("train.py", "model = build_model(", 1, rank, act)


def wait_for_message(said: Path) -> None:
    deadline = time.monotonic() + 100
    while not said.exists():
        assert time.monotonic() < deadline, "no message"
        time.sleep(0.05)


def end_all(said: Path, ranks: Ranks) -> None:
    """End the ranks once one of them has said something."""
    wait_for_message(said)
    for process in ranks:
        process.kill()


@pytest.mark.parametrize(
    ("rank", "how", "words"),
    [
        (1, None, rf"waiting for rank 1, which is in tests/faults/test_waiting.py:\d+ \(act\) on {HOST}\n"),
        (0, None, rf"waiting for rank 0, which is in tests/faults/test_waiting.py:\d+ \(act\) on {HOST}\n"),
        pytest.param(
            1,
            signal.SIGSTOP,
            r"waiting for rank 1, which does not run any more, or is stopped, and was in \w+/",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rank 1", "rank 0", "stopped"],
)
@pytest.mark.fault(
    "distributed",
    "a rank that does not come to meet the others: it prepares data, is stopped, or was killed",
    "after a minute, one rank says who is waited for, and in which line that rank is",
)
def test_rank_that_does_not_come(
    tiny: list[object], tmp_path: Path, rank: int, how: signal.Signals | None, words: str
) -> None:
    said = tmp_path / "said"
    argv = [*tiny, "--global_batch_size", 24, "--output_dir", tmp_path / "run"]
    outcome = train(3, argv, before=partial(hold, said, rank, how), meanwhile=partial(end_all, said))
    assert re.search(words, outcome.output), outcome.output
    assert len(re.findall("waiting for", outcome.output)) == 1, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "host"), [({}, "rank 0"), ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "torchrun")])
@pytest.mark.fault(
    "distributed",
    "the node of rank 0 has not started, or a firewall drops what is sent to its port",
    "after a minute, each other node says which address it waits for; SIGTERM ends it at once",
)
def test_store_that_is_not_open(tiny: list[object], tmp_path: Path, launcher: dict[str, str], host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free once the server has closed
    start = "import runpy, sys; sys.argv[0] = 'train.py'; from runtime.hang import waiting; waiting.PATIENCE = 1.0; "
    start += "runpy.run_path('train.py', run_name='__main__')"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", start, *map(str, tiny), "--output_dir", str(tmp_path)]
    environment = {**os.environ, **place, **launcher, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stderr
        expected = f"waiting for {host}, which has not opened 127.0.0.1:{port} yet\n"
        lines = list[str]()
        while not lines or lines[-1] != expected:
            lines.append(rank.stderr.readline())
            assert lines[-1], f"it ended: {lines}"
        rank.terminate()
        assert rank.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["hashes", pytest.param("data", marks=pytest.mark.slow)])
@pytest.mark.fault(
    "process",
    "another process has locked prepared data for long",
    "after a minute, a message names the process and the file; the run continues once the lock is free",
)
def test_locked_by_another_process(tiny: list[object], tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    argv = [*tiny, "--data_cache_dir", cache, "--max_steps", 1, "--output_dir"]
    cache.mkdir(mode=0o700)
    if name == "data":
        assert train(1, [*argv, tmp_path / "first"]).exit_codes == [0]
        (folder,) = (path for path in cache.glob("data-*") if path.is_dir())
        path = cache / f"{folder.name}.lock"
        folder.rename(tmp_path / "moved")
    else:
        path = cache / "hashes.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = tmp_path / "said"

        def release(ranks: Ranks) -> None:
            wait_for_message(said)
            fcntl.flock(file, fcntl.LOCK_UN)

        outcome = train(1, [*argv, tmp_path / "run"], before=partial(speak_early, said), meanwhile=release)
    assert outcome.exit_codes == [0], outcome.output
    assert f"waiting for process {os.getpid()}, which has locked {path}\n" in outcome.output
