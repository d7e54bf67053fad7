"""The loader of micro-batches: worker processes prepare them ahead of the training loop."""

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader

from config.errors import OptionError
from config.options import Options
from data.batches import Batch, collate, collate_pairs
from data.sequences import Mixture, PreparedDataset, Sequence
from data.stream import StreamingDataset
from runtime.workers import begin_worker, yield_batches

Collate = Callable[[list[Sequence]], Batch]


class ReadableBatches:
    """Micro-batches of `batches`, without an OptionError. After one, `error` has it, and all batches are `empty`.

    A block that is damaged or a record that cannot be read may be on one rank alone. So this rank still enters the
    collectives of a step, in which all ranks learn of the error and then end together.
    """

    def __init__(self, batches: Generator[Batch], empty: Batch | None = None) -> None:
        self.batches, self.empty = batches, empty
        self.error: OptionError | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.error is None:
            try:
                return next(self.batches)
            except OptionError as error:
                self.error = error
        return self.empty or collate([])

    def close(self) -> None:
        self.batches.close()


def collate_function(sequences: PreparedDataset | Mixture | StreamingDataset, options: Options) -> Collate:
    """How the sequences of a micro-batch become its tensors."""
    if options.objective == "dpo":
        return partial(collate_pairs, reference=sequences.reference)
    return partial(collate, padded_length=sequences.padded_length)


def make_loader(
    sequences: PreparedDataset | Mixture | StreamingDataset,
    batches: Iterable[list[int]] | None,
    options: Options,
    workers: int,
) -> Generator[Batch]:
    """Yields `batches` (lists of sequence numbers) as tensors, in that order, prepared ahead by `workers` processes.

    A stream has no numbers to choose from, so `batches` is None and each micro-batch takes the next sequences. Raises
    OptionError for data that cannot be read.
    """
    loader: DataLoader[Sequence] = DataLoader(
        sequences,
        batch_sampler=batches,  # torch accepts any iterable of lists
        batch_size=1 if batches else options.per_device_train_batch_size,  # torch demands 1 with a batch_sampler
        collate_fn=collate_function(sequences, options),
        worker_init_fn=begin_worker,
        num_workers=workers,
        prefetch_factor=options.dataloader_prefetch_factor if workers else None,
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU are asynchronous
        generator=torch.Generator(),  # its own, because the loader must not draw from the RNG of dropout
    )
    try:
        yield from yield_batches(loader)
    except OptionError as error:  # a worker process puts its traceback before the message
        raise OptionError(str(error).rpartition("OptionError: ")[2].strip()) from error


def stream_batches(dataset: StreamingDataset, options: Options) -> Generator[Batch]:
    """The micro-batches of one rank's `dataset`, without end. Raises OptionError for a record that cannot be read."""
    workers = min(1, options.dataloader_num_workers)  # because a batch has all lanes of the rank, each in its place
    return make_loader(dataset, None, options, workers)
