"""The forward pass without gradients, over a whole data set."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.options import Options
from config.plan import data_parallel_rank_and_size
from data.batches import Batch, to_device, validation_batches
from data.loader import make_loader
from data.sequences import Mixture, PreparedDataset


def forward_no_grad(
    wrapped: nn.Module, dataset: PreparedDataset | Mixture, options: Options, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields this rank's batches of `dataset`, each with the result of `wrapped`. Every rank must call."""
    wrapped.eval()
    rank, size = data_parallel_rank_and_size(options, dist.get_rank(), dist.get_world_size())
    indices = validation_batches(len(dataset), rank, size, options.per_device_eval_batch_size)
    for batch in make_loader(dataset, indices, options, workers=0):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            result = wrapped(**to_device(batch, device))
        yield batch, result
    wrapped.train()
