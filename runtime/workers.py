"""The worker processes of a data loader: what they do with signals, and what they lack when they end.

A worker sends its batches through shared memory and open files. Where there is too little of either, torch may let the
training loop wait for ever for a batch.
"""

import multiprocessing.queues
import os
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from config.errors import OptionError, first_line
from runtime.signals import SAVE_SIGNALS, STOP_SIGNALS, ignore_signals

# What torch or the operating system says when workers lack something, and the remedy.
LACKS = {
    "Too many open files": "raise the number of open files: ulimit -n 4096",
    "Resource temporarily unavailable": "raise the number of processes: ulimit -u, or the pids limit of the container",
    "unable to open shared memory": "give /dev/shm more room",
    "Read-only file system": "make /dev/shm writable",
    "No space left on device": "give /dev/shm more room",
    "DataLoader worker": "give /dev/shm or the memory more room: docker run --shm-size 1g, or a volume in Kubernetes",
}


def yield_batches(loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of a loader. Raises OptionError if its workers cannot start, or end because of a lack."""
    try:
        # Until begin_worker has run in a worker, SIGTERM would end it. Workers inherit this mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *SAVE_SIGNALS))
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from batches
    except (OSError, RuntimeError) as error:
        remedy = next((remedy for text, remedy in LACKS.items() if text in str(error)), None)
        if not loader.num_workers or not remedy or isinstance(error, OptionError):
            raise
        raise OptionError(
            f"dataloader_num_workers {loader.num_workers}: {first_line(error)}\n"
            f"{remedy}\nor pass --dataloader_num_workers 0"
        ) from error


def begin_worker(worker: int) -> None:
    """Set up a worker. If it cannot send a batch, it ends: torch would let the training loop wait for the batch."""
    ignore_signals(worker)

    def end(error: Exception, batch: object) -> None:
        os.write(2, f"a worker of the data loader could not send a batch: {first_line(error)}\n".encode())
        os._exit(1)

    # A queue calls this in its thread, for an error of pickling. Pickling a tensor allocates shared memory.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
