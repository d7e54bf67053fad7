"""The loader of micro-batches: worker processes prepare them ahead of the training loop."""

import multiprocessing.queues
import os
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config.errors import OptionError, first_line
from config.options import Options
from data.batches import collate, collate_pairs
from data.sequences import Mixture, PreparedDataset, Sequence
from data.stream import StreamingDataset
from runtime import ignore_signals

# What torch or the operating system says when workers lack something, and the remedy.
LACKS = {
    "Too many open files": "raise the number of open files: ulimit -n 4096",
    "Resource temporarily unavailable": "raise the number of processes: ulimit -u, or the pids limit of the container",
    "unable to open shared memory": "give /dev/shm more room",
    "Read-only file system": "make /dev/shm writable",
    "No space left on device": "give /dev/shm more room",
    "DataLoader worker": "give /dev/shm or the memory more room: docker run --shm-size 1g, or a volume in Kubernetes",
}


def make_loader(
    sequences: PreparedDataset | Mixture | StreamingDataset,
    batches: Iterable[list[int]] | None,
    options: Options,
    workers: int,
) -> DataLoader[Sequence]:
    """A loader of `batches` (lists of sequence numbers), in that order, prepared ahead by `workers` processes.

    A stream has no numbers to choose from, so `batches` is None and each micro-batch takes the next sequences.
    """
    return DataLoader(
        sequences,
        batch_sampler=batches,  # torch accepts any iterable of lists
        batch_size=1 if batches else options.per_device_train_batch_size,  # torch demands 1 with a batch_sampler
        collate_fn={
            "sft": partial(collate, padded_length=sequences.padded_length),
            "dpo": partial(collate_pairs, reference=sequences.reference),
        }[options.objective],
        worker_init_fn=_begin_worker,
        num_workers=workers,
        prefetch_factor=options.dataloader_prefetch_factor if workers else None,
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU are asynchronous
        generator=torch.Generator(),  # its own, because the loader must not draw from the RNG of dropout
    )


def load(loader: DataLoader[Sequence]) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of a loader. Raises OptionError if its workers cannot start, or end because of a lack."""
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        remedy = next((remedy for text, remedy in LACKS.items() if text in str(error)), None)
        if not loader.num_workers or not remedy or isinstance(error, OptionError):
            raise
        raise OptionError(
            f"dataloader_num_workers {loader.num_workers}: {first_line(error)}\n"
            f"{remedy}\nor pass --dataloader_num_workers 0"
        ) from error


def stream_batches(dataset: StreamingDataset, options: Options) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of one rank's `dataset`, without end. Raises OptionError for a record that cannot be read."""
    workers = min(1, options.dataloader_num_workers)  # because each worker would read all of the text
    try:
        yield from load(make_loader(dataset, None, options, workers))
    except OptionError as error:  # a worker process puts its traceback before the message
        raise OptionError(str(error).rpartition("OptionError: ")[2].strip()) from error


def _begin_worker(worker: int) -> None:
    """Set up a worker. If it cannot send a batch, it ends: torch would let the training loop wait for the batch."""
    ignore_signals(worker)

    def end(error: Exception, batch: object) -> None:
        os.write(2, f"a worker of the data loader could not send a batch: {first_line(error)}\n".encode())
        os._exit(1)

    # A queue calls this in its thread, for an error of pickling. Pickling a tensor allocates shared memory.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
