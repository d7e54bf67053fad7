"""The loader of micro-batches: worker processes prepare them ahead of the training loop."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config.errors import OptionError
from config.options import Options
from data.batches import collate, collate_pairs
from data.sequences import Mixture, PreparedDataset, Sequence
from data.stream import StreamingDataset
from runtime.workers import begin_worker, yield_batches


def make_loader(
    sequences: PreparedDataset | Mixture | StreamingDataset,
    batches: Iterable[list[int]] | None,
    options: Options,
    workers: int,
) -> Iterator[dict[str, Tensor]]:
    """Yields `batches` (lists of sequence numbers) as tensors, in that order, prepared ahead by `workers` processes.

    A stream has no numbers to choose from, so `batches` is None and each micro-batch takes the next sequences.
    """
    loader: DataLoader[Sequence] = DataLoader(
        sequences,
        batch_sampler=batches,  # torch accepts any iterable of lists
        batch_size=1 if batches else options.per_device_train_batch_size,  # torch demands 1 with a batch_sampler
        collate_fn={
            "sft": partial(collate, padded_length=sequences.padded_length),
            "dpo": partial(collate_pairs, reference=sequences.reference),
        }[options.objective],
        worker_init_fn=begin_worker,
        num_workers=workers,
        prefetch_factor=options.dataloader_prefetch_factor if workers else None,
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU are asynchronous
        generator=torch.Generator(),  # its own, because the loader must not draw from the RNG of dropout
    )
    return yield_batches(loader)


def stream_batches(dataset: StreamingDataset, options: Options) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of one rank's `dataset`, without end. Raises OptionError for a record that cannot be read."""
    workers = min(1, options.dataloader_num_workers)  # because each worker would read all of the text
    try:
        yield from make_loader(dataset, None, options, workers)
    except OptionError as error:  # a worker process puts its traceback before the message
        raise OptionError(str(error).rpartition("OptionError: ")[2].strip()) from error
