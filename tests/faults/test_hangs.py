"""Proves runtime/hang/watch.py and metrics/stragglers.py: a hang names the missing rank, and what the others wait for.

Each message has an example in docs/troubleshooting.md, with the same words.
"""

import ctypes
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import metrics
import metrics.recorder
import metrics.stragglers
from metrics.records import read_records
from runtime.hang import stacks
from runtime.hang.__main__ import compare, read
from runtime.hang.explain import WAITING_FOR_DATA, Beat, Peer, explain
from tests.launch import ROOT, Outcome, Ranks, train

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
TIMEOUT = 10  # seconds, of a collective
DEADLINE = 90  # seconds; the machine may be busy


def form(text: str) -> str:
    """A message without what differs between runs: nodes, numbers, places and paths."""
    text = re.sub(r"\([\w.-]+, pid \d+\)", "(node, pid 0)", text)
    text = re.sub(r"\S+\.py:\d+ \(\w+\)", "PLACE", text)
    text = re.sub(r"\S+/hang/", "output/hang/", text)
    text = re.sub(r" on [\w.-]+, or end", " on node, or end", text)
    text = re.sub(r"whether [\w.-]+ is up", "whether node is up", text)
    text = re.sub(r"forward and backward, micro-step \d+ of \d+|training", "ACTIVITY", text)
    text = re.sub(r"ranks? [\d, ]+ waits? (in|for) (the GPU|\w+)", "RANKS WAIT", text)
    return re.sub(r"\d+", "0", text)


def message(outcome: Outcome) -> str:
    """The message about a hang, which is printed once. Its words must be in the page."""
    lines = outcome.output.splitlines()
    (last,) = [number for number, line in enumerate(lines) if line.startswith("stacks of the ranks: ")]
    text = "\n".join(lines[last - 2 : last + 1]).removeprefix("(Pdb) ")
    assert_documented(text)
    return text


def assert_documented(text: str) -> None:
    for line in text.splitlines():
        assert form(line) in form(PAGE), f"docs/troubleshooting.md has no example of this message:\n{text}"


def hang(
    tiny: list[object],
    output_dir: Path,
    fault: Callable[[Ranks], None],
    hung: int,
    before: Callable[[], None] | None = None,
    options: tuple[object, ...] = (),
    world_size: int = 2,
) -> str:
    """Run until the `fault` after three steps, and return the message. Rank `hung` is killed when the others ended."""

    def inject(ranks: Ranks) -> None:
        while len(read_records(output_dir / "metrics.jsonl")) < 3:
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.01)
        fault(ranks)
        survivors = [process for rank, process in enumerate(ranks) if rank != hung]
        end = time.monotonic() + DEADLINE
        for process in survivors:
            process.join(max(0.0, end - time.monotonic()))
        ended = [process.exitcode for process in survivors]
        ranks[hung].kill()
        assert ended == [1] * len(survivors), "it hung"

    argv = [*tiny, "--output_dir", output_dir, "--max_steps", 100_000, "--ddp_timeout", TIMEOUT, *options]
    return message(train(world_size, argv, before=before, meanwhile=inject))


def nothing(ranks: Ranks) -> None:
    """The fault is in the rank itself."""


def stop(rank: int, ranks: Ranks) -> None:
    os.kill(ranks[rank].pid or 0, signal.SIGSTOP)


@pytest.mark.fault(
    "distributed",
    "SIGSTOP of a rank",
    "the others end within `--ddp_timeout` and name the rank, the step and the collective that each waits in",
)
@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stopped_rank(tiny: list[object], tmp_path: Path, stopped: int) -> None:
    text = hang(tiny, tmp_path, partial(stop, stopped), stopped, options=("--flight_recorder",))
    other = 1 - stopped
    assert re.match(
        rf"rank {stopped} \(\S+, pid \d+\) is stopped \(SIGSTOP\); rank {other} waits in \w+ of step \d+, "
        r"(train|\w+/\w+)\.py:\d+ ",
        text,
    )
    stack = (tmp_path / "hang" / f"rank-{other}.txt").read_text()
    assert f"rank {other} " in stack.splitlines()[0]
    assert "train.py" in stack
    if other == 0:
        assert "rank 0 waits in " in "\n".join(compare(read(tmp_path / "hang")))


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "SIGSTOP of a worker of the data loader",
    "the message names the rank and the process, and the run ends, also on one rank",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_stopped_worker(tiny: list[object], tmp_path: Path, world_size: int) -> None:
    hung = world_size - 1

    def stop_workers(ranks: Ranks) -> None:
        for tasks in Path(f"/proc/{ranks[hung].pid}/task").glob("*/children"):
            for child in tasks.read_text().split():
                os.kill(int(child), signal.SIGSTOP)
        if world_size == 1:
            ranks[0].join(DEADLINE)
            assert ranks[0].exitcode == 1

    text = hang(tiny, tmp_path, stop_workers, hung, options=("--dataloader_num_workers", 1), world_size=world_size)
    assert re.match(rf"rank {hung} .* waiting for data, .* its process \d+ \(pt_data_worker\) is stopped", text)


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "SIGSTOP of rank 0 when it keeps the store of the ranks, as without torchrun",
    "the others end within `--ddp_timeout` and name it",
)
def test_stopped_rank_with_the_store(tiny: list[object], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "train.py", *tiny, "--output_dir", tmp_path, "--max_steps", 100_000]
    command += ["--ddp_timeout", TIMEOUT]
    place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while len(read_records(tmp_path / "metrics.jsonl")) < 3:
            assert all(process.poll() is None for process in ranks)
            time.sleep(0.01)
        ranks[0].send_signal(signal.SIGSTOP)
        _, output = ranks[1].communicate(timeout=DEADLINE)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[1].returncode == 1
    text = message(Outcome([], output))
    assert re.match(r"rank 0 \(\S+, pid \d+\) is stopped \(SIGSTOP\); rank 1 waits in", text)


def on_rank_1(fault: Callable[[], None]) -> None:
    """Call `fault` on rank 1 within step 5."""
    step, calls = metrics.Recorder.step, list[int]()

    def faulty(self: metrics.Recorder, tokens: int) -> None:
        calls.append(tokens)
        if len(calls) == 5 and os.environ["RANK"] == "1":
            fault()
        step(self, tokens)

    metrics.Recorder.step = faulty  # type: ignore[method-assign]


def loop() -> None:
    while True:
        pass


def debug() -> None:
    sys.stdin = os.fdopen(os.pipe()[0])  # a terminal at which the user does not type
    breakpoint()


def fail() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
@pytest.mark.fault(
    "distributed", "a rank in a loop without end", "the others end within `--ddp_timeout` and say where that rank is"
)
def test_endless_loop(tiny: list[object], tmp_path: Path) -> None:
    text = hang(tiny, tmp_path, nothing, 1, before=partial(on_rank_1, loop))
    assert re.match(
        r"rank 1 \(\S+, pid \d+\) is in step 5, .*, tests/faults/test_hangs.py:\d+ \(loop\), for \d+ s", text
    )
    assert "rank 0 waits in all_reduce of step 5" in text


@pytest.mark.slow
@pytest.mark.fault("distributed", "a rank that waits in a debugger", "the message says so, and which rank it is")
def test_debugger(tiny: list[object], tmp_path: Path) -> None:
    text = hang(tiny, tmp_path, nothing, 1, before=partial(on_rank_1, debug))
    assert re.match(
        r"rank 1 \(\S+, pid \d+\) is in step 5, .*, in a debugger; rank 0 waits in all_reduce of step 5", text
    )


@pytest.mark.slow
@pytest.mark.fault(
    "distributed", "an error on one rank alone", "the others name that rank and its error, and end with it"
)
def test_error_of_one_rank(tiny: list[object], tmp_path: Path) -> None:
    text = hang(tiny, tmp_path, nothing, 1, before=partial(on_rank_1, fail))
    assert re.match(r"rank 1 \(\S+, pid \d+\) has failed: OutOfMemoryError: CUDA out of memory; rank 0 waits in", text)


@pytest.mark.slow
@pytest.mark.fault("distributed", "SIGKILL of a rank", "the others end at once and name the rank that has ended")
def test_killed_rank(tiny: list[object], tmp_path: Path) -> None:
    text = hang(tiny, tmp_path, lambda ranks: ranks[1].kill(), 1)
    assert re.match(r"rank 1 \(\S+, pid \d+\) has ended; rank 0 waits in \w+ of step \d", text)


def wait_like_nccl() -> None:
    """On rank 0, an all-reduce that fails waits instead. Rank 1 ends in its tenth."""
    all_reduce, rank, calls = dist.all_reduce, os.environ["RANK"], itertools.count(1)
    code = "def all_reduce(*args, **kwargs):\n    return function(*args, **kwargs)"

    def function(*args: Any, **kwargs: Any) -> Any:
        if rank == "1" and next(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return all_reduce(*args, **kwargs)
        except RuntimeError:
            threading.Event().wait()

    names: dict[str, Any] = {"function": function}
    exec(compile(code, dist.distributed_c10d.__file__, "exec"), names)  # in a stack, it is torch's own
    dist.all_reduce = names["all_reduce"]


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "SIGKILL of a rank while another one waits for it in a collective that does not fail, as with NCCL",
    "the waiting rank names it, and ends",
)
def test_waits_for_a_killed_rank(tiny: list[object], tmp_path: Path) -> None:
    options = [*tiny, "--output_dir", tmp_path, "--max_steps", 100_000, "--ddp_timeout", 600]
    ended = train(2, options, before=wait_like_nccl)
    assert ended.exit_codes == [1, -signal.SIGKILL]
    assert re.search(r"rank 1 \(\S+, pid \d+\) has ended; rank 0 waits in all_reduce of step \d", ended.output)
    assert "rank 0: another rank has ended" in ended.output


def open_anything() -> None:
    """Open metrics.jsonl without a check, because a pipe, which would be refused, stands for a disk that hangs."""
    metrics.recorder.regular_file = os.open


@pytest.mark.slow
@pytest.mark.fault(
    "storage",
    "a file system that hangs while rank 0 writes metrics.jsonl",
    "the other ranks end within `--ddp_timeout`, and the message says where rank 0 is",
)
def test_hanging_disk(tiny: list[object], tmp_path: Path) -> None:
    def hang_disk(ranks: Ranks) -> None:
        os.mkfifo(tmp_path / "fifo")  # to open it waits for a reader
        (tmp_path / "fifo").rename(tmp_path / "metrics.jsonl")

    text = hang(tiny, tmp_path, hang_disk, 0, before=open_anything)
    assert re.match(
        r"rank 0 \(\S+, pid \d+\) is in .*, metrics/recorder.py:\d+ \(_append\), for \d+ s; rank 1 waits", text
    )


def stop_or_launch() -> None:
    """In step 5, rank 1 stops, and rank 0 does not return from a call, as from the launch of a kernel."""
    step, calls = metrics.Recorder.step, itertools.count(1)

    def faulty(self: metrics.Recorder, tokens: int) -> None:
        if next(calls) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif os.environ["RANK"] == "0" and self.activity.step == 5:
            torch.cuda.is_initialized = lambda: True
            ctypes.CDLL(None).sleep(1000)  # without the interpreter's lock, as in torch
        step(self, tokens)

    metrics.Recorder.step = faulty  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "SIGSTOP of a rank while another one cannot start a kernel, because its GPU waits for that rank",
    "the waiting rank names the stopped one, and ends",
)
def test_full_queue(tiny: list[object], tmp_path: Path) -> None:
    text = hang(tiny, tmp_path, nothing, 1, before=stop_or_launch)
    assert re.match(r"rank 1 \(\S+, pid \d+\) is stopped \(SIGSTOP\); rank 0 waits for the GPU of step 5, ", text)


def hold_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "a rank whose call holds the interpreter, as the launch of a compiled kernel does",
    "the others name that rank, and a thread of C prints its stacks",
)
def test_held_interpreter(tiny: list[object], tmp_path: Path) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 100_000, "--ddp_timeout", TIMEOUT]

    def wait(ranks: Ranks) -> None:
        ranks[0].join(DEADLINE)
        time.sleep(TIMEOUT)
        ranks[1].kill()

    outcome = train(2, argv, before=partial(on_rank_1, hold_interpreter), meanwhile=wait)
    assert outcome.exit_codes == [1, -signal.SIGKILL]
    assert re.match(r"rank 1 \(\S+, pid \d+\) has not been heard of for \d+ s; rank 0 waits in", message(outcome))
    printed = outcome.output.partition("Timeout (0:00:13)!")[2]
    assert re.search(r"test_hangs.py\W+line \d+ in hold_interpreter", printed), outcome.output


def skip() -> None:
    """Skip the next all-reduce, and do another collective instead."""
    all_reduce = dist.all_reduce

    def skipping(*arguments: object, **options: object) -> None:
        dist.all_reduce = all_reduce
        dist.barrier()

    dist.all_reduce = skipping


@pytest.mark.slow
@pytest.mark.fault(
    "distributed",
    "a rank that skips a collective",
    "the others end within `--ddp_timeout`, and the message says in which collective each rank waits",
)
def test_skipped_collective(tiny: list[object], tmp_path: Path) -> None:
    text = hang(tiny, tmp_path, nothing, 1, before=partial(on_rank_1, skip))
    assert re.match(r"ranks? .* waits? in \w+ of step \d+, .*; ranks? .* waits? in \w+ of step \d+", text)


@pytest.mark.slow
@pytest.mark.fault("distributed", "a rank that is stopped for a moment", "no message, and the run goes on to its end")
def test_short_stop_is_no_hang(tiny: list[object], tmp_path: Path) -> None:
    def pause(ranks: Ranks) -> None:
        while len(read_records(tmp_path / "metrics.jsonl")) < 3:
            assert ranks[0].is_alive()
            time.sleep(0.01)
        os.kill(ranks[1].pid or 0, signal.SIGSTOP)
        time.sleep(2)
        os.kill(ranks[1].pid or 0, signal.SIGCONT)

    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 40, "--ddp_timeout", 20]
    outcome = train(2, argv, meanwhile=pause)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "stacks of the ranks" not in outcome.output
    assert not (tmp_path / "hang").exists()


PEERS = [Peer("node-a", "a", 100, 1, 0.0), Peer("node-a", "a", 101, 1, 0.0), Peer("node-b", "b", 100, 1, 0.0)]


def beats(*changes: dict[str, object]) -> list[Beat]:
    """Beats of three ranks that wait in the same collective, with changes to the last ones."""
    usual = [
        Beat(rank, 41, "step 41, training", "train.py:150 (main)", "all_reduce", False, 590.0, 0.0) for rank in range(3)
    ]
    for beat, change in zip(usual[::-1], changes, strict=False):
        for name, value in change.items():
            setattr(beat, name, value)
    return usual


LOADING: dict[str, object] = {"collective": WAITING_FOR_DATA, "activity": f"step 41, {WAITING_FOR_DATA}"}


WORDS: dict[str, tuple[list[dict[str, object]], str]] = {
    "all": ([{}], "all ranks wait in all_reduce of step 41, train.py:150 (main)"),
    "silent": ([{"silent": 600.0}], "rank 2 (node-b, pid 100) has not been heard of for 600 s; ranks 0, 1 wait"),
    "ptrace": ([{"state": stacks.STATES["t"]}], "rank 2 (node-b, pid 100) is stopped by a debugger; ranks 0, 1"),
    "disk": ([{"state": stacks.STATES["D"]}], "rank 2 (node-b, pid 100) waits for a disk or a driver (state D);"),
    "data": ([LOADING], "rank 2 (node-b, pid 100) is in step 41, waiting for data, "),
    "no store": ([{"silent": math.inf}], "rank 2 (node-b, pid 100) cannot be asked"),
    "different collectives": (
        [{"step": 42, "where": "loss/router.py:90 (metrics)"}],
        "rank 2 waits in all_reduce of step 42, loss/router.py:90 (metrics); ranks 0, 1 wait in all_reduce of step 41",
    ),
    "a node": (
        [{"silent": 601.0}, {"silent": 600.0}],
        "rank 1 (node-a, pid 101) has not been heard of for 600 s; also rank 2; rank 0 waits in",
    ),
    "the cause comes first": (
        [{"silent": 600.0}, {"state": stacks.STATES["Z"]}],
        "rank 1 (node-a, pid 101) has ended; rank 0 waits in all_reduce",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), WORDS.values(), ids=WORDS)
def test_words(changes: list[dict[str, object]], expected: str) -> None:
    """Each message has at most two lines, and its words are in the page."""
    text = explain(beats(*changes), PEERS, silent=30)
    assert text.startswith(expected)
    assert len(text.splitlines()) == 2
    assert_documented(text)


@pytest.mark.slow
@pytest.mark.fault("distributed", "a rank that is slower than the others", "the log and metrics.jsonl name it")
def test_straggler(tiny: list[object], tmp_path: Path) -> None:
    """One rank runs for a third of the time, as if its CPU were busy."""

    def slow_down(ranks: Ranks) -> None:
        while len(read_records(tmp_path / "metrics.jsonl")) < 2:
            assert ranks[1].is_alive()
            time.sleep(0.01)
        while "rank 1 (" not in (tmp_path / "log").read_text():
            for number, seconds in ((signal.SIGSTOP, 0.012), (signal.SIGCONT, 0.006)):
                assert ranks[1].is_alive()
                os.kill(ranks[1].pid or 0, number)
                time.sleep(seconds)
        os.kill(ranks[1].pid or 0, signal.SIGTERM)

    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 100_000, "--logging_steps", 10]
    (tmp_path / "log").touch()
    outcome = train(2, argv, before=partial(report_soon, tmp_path / "log"), meanwhile=slow_down)
    assert outcome.exit_codes == [128 + signal.SIGTERM] * 2, outcome.output
    line = next(line for line in outcome.output.splitlines() if re.search(r"rank 1 \(\S+\) has been slow for", line))
    assert_documented(re.sub(r"\(\S+\)", "(node-b)", line))
    records = [record for record in read_records(tmp_path / "metrics.jsonl") if "slowest_rank" in record]
    assert all(f"    {name}" in str(metrics.recorder.__doc__) for name in records[0])
    assert [record["slowest_rank"] for record in records].count(1) >= 3
    assert all(0 <= record["slowest_rank_lag"] <= 1 for record in records)


def report_soon(log: Path) -> None:
    """Report a slow rank after three records, and write the report to a file, which the test reads."""
    metrics.stragglers.RECORDS, metrics.stragglers.SECONDS = 3, 1.0
    report = metrics.stragglers.Stragglers.report

    def reported(self: metrics.stragglers.Stragglers) -> str:
        text = report(self)
        with open(log, "a") as file:
            file.write(text)
        return text

    metrics.stragglers.Stragglers.report = reported  # type: ignore[method-assign]


def test_only_a_rank_that_stays_slow_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lag must last for several records, and over a minute. The message comes once."""
    stragglers = metrics.stragglers.Stragglers([torch.nn.Linear(2, 2)], torch.device("cpu"))
    times: list[tuple[float, float]] = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def all_gather(gathered: list[torch.Tensor], mine: torch.Tensor) -> None:
        for tensor, values in zip(gathered, times, strict=True):
            tensor.copy_(torch.tensor(values))

    monkeypatch.setattr(dist, "all_gather", all_gather)

    def record(waits: tuple[float, ...], layers: tuple[float, ...]) -> tuple[dict[str, float], str]:
        times[:] = zip(waits, layers, strict=True)
        return stragglers.gather(20.0, 0.0), stragglers.report()

    waits, usual = (0.02, 0.01, 0.5), (1.0, 1.1, 0.9)
    for _ in range(4):
        assert record(waits, usual)[1] == ""
    fields, text = record(waits, usual)
    assert fields == {"slowest_rank": 2, "slowest_rank_lag": pytest.approx(0.48)}
    assert text.startswith("rank 2 (rank 2) has been slow for 100 s, and the others wait: it waits for data 50% of the")
    assert record(waits, usual)[1] == ""
    for rank in (0, 1, 0, 1, 0, 1, 0, 1):  # now one rank, now another: a busy machine
        assert record((0.0, 0.0, 0.0), tuple(3.0 if rank == each else 1.0 for each in range(3)))[1] == ""
    assert record((0.1, 0.2, 0.3), (1.0, 1.2, 0.9))[0]["slowest_rank_lag"] < metrics.stragglers.BOUND
