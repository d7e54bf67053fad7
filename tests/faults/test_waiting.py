"""Proves runtime/hang/waiting.py and runtime/peers.py: before the ranks have met, a message says who is waited for."""

import fcntl
import os
import re
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from runtime.hang import waiting
from runtime.peers import INTERVAL
from tests.kills import at_line
from tests.launch import Ranks, train

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
