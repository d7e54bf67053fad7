"""The sharded optimizer: each rank updates its shard of each parameter, and holds AdamW's state of that shard only.

Parameters and gradients stay replicated. This is stage 1 of ZeRO (Rajbhandari et al. 2020, section 5.1).
"""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

BUCKET = 64 * 2**20  # bytes that one all-gather of fp32 parameters gathers


def shard_optimizer(optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Replace each parameter of the optimizer by this rank's shard: 1 / world size of its rows. Every rank must call.

    The shards are DTensors over `mesh["replicate"]` and views of the model's parameters. The optimizer updates the
    model in place, and a checkpoint knows which rows a rank has. The state of the other shards needs no memory here.
    """
    ranks = mesh["replicate"]
    for group in optimizer.param_groups:
        group["replicated"] = group["params"]
        group["params"] = [nn.Parameter(_shard(parameter.detach(), ranks)) for parameter in group["params"]]

    def set_shard_gradients(optimizer: Optimizer, *step_arguments: object) -> None:
        for group in optimizer.param_groups:
            for shard, full in zip(group["params"], group["replicated"], strict=True):
                shard.grad = _shard(full.grad, ranks)

    def clear_shard_gradients(optimizer: Optimizer, *step_arguments: object) -> None:
        # They are views of DDP's buckets, and valid in this step only.
        for group in optimizer.param_groups:
            for shard in group["params"]:
                shard.grad = None

    optimizer.register_step_pre_hook(set_shard_gradients)
    optimizer.register_step_post_hook(clear_shard_gradients)


def gather_parameters(optimizer: Optimizer) -> None:
    """All-gather the shards that each rank has updated, in place. Every rank must call.

    Does nothing without a sharded optimizer. Communicates all parameters once, and needs the memory of one bucket.
    Together with the all-reduce of the gradients, that is 1.5 times the traffic of plain DDP.
    """
    parameters = [full.detach() for group in optimizer.param_groups for full in group.get("replicated", ())]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for bucket in gather_buckets(parameters, ranks):
        sizes = [size for _, _, size in bucket]
        gathered = parameters[0].new_empty(ranks, sum(sizes))
        pieces = list(zip(bucket, gathered.split(sizes, dim=1), strict=True))
        for (full, first, size), of_ranks in pieces:
            updated = _rows_of(rank, full).view(-1)[first : first + size]
            of_ranks[rank, : len(updated)] = updated
        dist.all_gather_into_tensor(gathered.view(-1), gathered[rank])
        for (full, first, size), of_ranks in pieces:
            shard_size = _shard_size(full, ranks)
            equal = full.numel() // shard_size  # so many ranks have equal shards; the next one has the rest
            shards, rest = full.view(-1).tensor_split([equal * shard_size])
            shards.view(equal, shard_size)[:, first : first + size] = of_ranks[:equal]
            rest = rest[first : first + size]
            rest.copy_(of_ranks[equal : equal + 1, : len(rest)].flatten())


def gather_buckets(parameters: list[Tensor], ranks: int) -> Iterator[list[tuple[Tensor, int, int]]]:
    """The content of each all-gather: a parameter, and `size` elements of each rank's shard from element `first` on.

    Shards are padded to the size of the largest. All buckets but the last have BUCKET bytes, over all ranks. A single
    rank has no bucket. The parameters may be on the meta device.
    """
    bucket: list[tuple[Tensor, int, int]] = []
    room = capacity = BUCKET // (4 * ranks)
    for full in parameters if ranks > 1 else ():
        first, shard_size = 0, _shard_size(full, ranks)
        while first < shard_size:
            size = min(room, shard_size - first)
            bucket.append((full, first, size))
            first, room = first + size, room - size
            if not room:
                yield bucket
                bucket, room = [], capacity
    if bucket:
        yield bucket


def _shard_size(full: Tensor, ranks: int) -> int:
    """The number of elements in the largest shard of a parameter."""
    return -(-len(full) // ranks) * (full.numel() // len(full))


def _shard(full: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a replicated tensor, as a DTensor that is a view of it."""
    rows = _rows_of(dist.get_rank(), full)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


def _rows_of(rank: int, full: Tensor) -> Tensor:
    """The rows (first dimension) that belong to `rank`. The last ranks may have fewer, or none."""
    rows = -(-len(full) // dist.get_world_size())
    return full[rank * rows : (rank + 1) * rows]
