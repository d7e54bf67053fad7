"""A real torchrun of train.py, its processes, and waiting for what happens in it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metrics.records import read_records
from tests.launch import ROOT

DEADLINE = 120  # seconds for what takes a few; only a hang lasts as long


class Torchrun:
    """torchrun with `flags` that runs `train.py argv` and writes all that is printed to `log`."""

    def __init__(self, flags: Sequence[object], argv: Sequence[object], log: Path) -> None:
        words = [sys.executable, "-m", "torch.distributed.run", *flags, ROOT / "train.py", *argv]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen([str(word) for word in words], stdout=file, stderr=file, cwd=ROOT)

    def ranks(self) -> list[int]:
        """The processes of its ranks, in the order in which they were started."""
        return children(self.process.pid)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for `condition`, or for the end of torchrun."""
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None and not condition():
            assert time.monotonic() < deadline, f"it hung\n{self.output()}"
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for its end. Returns its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=DEADLINE)
        raise AssertionError(f"torchrun has not ended\n{self.output()}")


@contextlib.contextmanager
def torchrun(flags: Sequence[object], argv: Sequence[object], log: Path) -> Iterator[Torchrun]:
    """Start torchrun. No process of it is left at the end, whatever happens."""
    run = Torchrun(flags, argv, log)
    seen: set[int] = set()
    try:
        yield run
    finally:
        seen |= set(family(run.process.pid))
        for process in [run.process.pid, *seen]:
            kill(process)
        run.process.wait()


def children(process: int) -> list[int]:
    """The child processes of all threads of a process."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    with contextlib.suppress(OSError):
        return sorted(int(number) for path in lists for number in path.read_text().split())
    return []


def family(process: int) -> list[int]:
    """The children of a process, their children, and so on."""
    found = children(process)
    return found + [each for child in found for each in family(child)]


def alive(process: int) -> bool:
    """Whether a process runs: it exists, and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def last_step(output_dir: Path) -> int:
    """The last step in metrics.jsonl; -1 before the first record."""
    try:
        return max((record["step"] for record in read_records(output_dir / "metrics.jsonl")), default=-1)
    except (OSError, ValueError):
        return -1
