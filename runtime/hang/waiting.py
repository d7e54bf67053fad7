"""Says who is waited for before the ranks have met: another rank, or the process that has locked a file.

Once they have met, watch.py explains what a rank waits for.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

PATIENCE = 60.0  # seconds; a longer wait is explained
OF_A_RUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")  # equal on all ranks of a run


@contextmanager
def explained(text: Callable[[], str]) -> Iterator[None]:
    """Print `text()` once if the block takes longer than PATIENCE; nothing if it is ""."""

    def explain() -> None:
        if message := text():
            print(message, file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, explain)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file in data_cache_dir. If that takes long, one rank of each node says which process has the lock.

    Raises OSError if the file cannot be opened or locked.
    """
    lock = FileLock(path)
    with explained(lambda: _who_holds(path)):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _who_holds(path: Path) -> str:
    """The message of this rank about the process that has locked `path`; "" if another rank says it."""
    holder, rank, local_rank = find_holder(path), "", ""
    if holder:
        with suppress(OSError):  # of another user, or ended meanwhile
            pairs = Path(f"/proc/{holder}/environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if all(environment.get(name) == os.environ.get(name) for name in OF_A_RUN):
                rank, local_rank = environment.get("RANK", ""), environment.get("LOCAL_RANK", "")
    if os.environ.get("LOCAL_RANK", "0") != ("1" if local_rank == "0" else "0"):
        return ""
    if rank:
        return f"waiting for rank {rank} (process {holder}), which prepares data"
    who = f"process {holder}" if holder else "a process of another node"
    return (
        f"waiting for {who}, which has locked {path}\n"
        "it may prepare data for another run; pass another --data_cache_dir to train without it"
    )


def find_holder(path: Path) -> int:
    """The process of this node that has locked a file with flock; 0 if there is none, or the system is not Linux."""
    with suppress(OSError):
        status = path.stat()
        file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # number, FLOCK, ADVISORY, WRITE, process, file, start, end
            if fields[1] == "FLOCK" and fields[5] == file:
                return int(fields[4])
    return 0
