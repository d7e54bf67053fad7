"""The life of a process: what the launcher says of its rank, the signals that stop it, and its exit."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def rank_from_environment() -> tuple[int, int, int]:
    """Rank, world size and rank on this host, as torchrun sets them; alone, the only process is rank 0 of 1."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def listen_for_stop_signals() -> threading.Event:
    """An event that SIGTERM or Ctrl-C sets: the step is finished and saved. A second signal ends the process."""
    stop_requested = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop_requested.set()
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)

    for stop in STOP_SIGNALS:
        signal.signal(stop, request)
    return stop_requested


def ignore_stop_signals(worker: int) -> None:
    """For a worker process of a loader: signals reach whole process groups, but the step still needs its rows."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)


def exit_process(exit_code: int) -> NoReturn:
    """End the process, and leave the rest to the operating system: files are closed, peers have passed the barrier.

    There is no destroy_process_group, and no teardown by Python: both destroy gloo's process group while they hold the
    interpreter's lock, and wait for gloo's threads, which may just then need that lock to release a tensor. Such a run
    hung once in some hundred, or aborted ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
