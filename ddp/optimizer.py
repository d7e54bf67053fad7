"""The sharded optimizer: each rank updates its shard of each parameter, and holds AdamW's state of that shard only.

Parameters and gradients stay replicated. This is stage 1 of ZeRO (Rajbhandari et al. 2020, section 5.1).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer


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
    """Broadcast the updated shards of each rank to all ranks. Every rank must call.

    Does nothing without a sharded optimizer. Communicates all parameters once, and needs 1 / world size of their memory
    for a moment. Together with the all-reduce of the gradients, that is 1.5 times the traffic of plain DDP.
    """
    parameters = [full.detach() for group in optimizer.param_groups for full in group.get("replicated", ())]
    for owner in range(dist.get_world_size()) if parameters else ():
        shards = [_rows_of(owner, full) for full in parameters]
        flat = torch.cat([shard.flatten() for shard in shards])
        dist.broadcast(flat, src=owner)
        received = torch.split(flat, [shard.numel() for shard in shards])
        torch._foreach_copy_(shards, [rows.view_as(shard) for rows, shard in zip(received, shards, strict=True)])


def _shard(full: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a replicated tensor, as a DTensor that is a view of it."""
    rows = _rows_of(dist.get_rank(), full)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


def _rows_of(rank: int, full: Tensor) -> Tensor:
    """The rows (first dimension) that belong to `rank`. The last ranks may have fewer, or none."""
    rows = -(-len(full) // dist.get_world_size())
    return full[rank * rows : (rank + 1) * rows]
