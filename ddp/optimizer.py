"""The sharded optimizer (ZeRO stage 1): a rank updates its part of each parameter, and keeps AdamW's state of that."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer


def shard_optimizer(optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Leave this rank's optimizer a part of each parameter: 1 / world size of its rows. Every rank must call.

    The parts are views into the model's parameters, as sharded tensors, so that the optimizer works in place and a
    checkpoint knows which rows it has. Saves the memory of the state of all others; the gradient stays whole.
    """
    ranks = mesh["replicate"]
    for group in optimizer.param_groups:
        group["replicated"] = group["params"]
        group["params"] = [nn.Parameter(_shard(parameter.detach(), ranks)) for parameter in group["params"]]

    def hand_over_gradients(optimizer: Optimizer, *step_arguments: object) -> None:
        for group in optimizer.param_groups:
            for part, whole in zip(group["params"], group["replicated"], strict=True):
                part.grad = _shard(whole.grad, ranks)

    def let_go_of_gradients(optimizer: Optimizer, *step_arguments: object) -> None:
        # They are views into DDP's buckets. In its second step, DDP makes others, and these would stay beside them.
        for group in optimizer.param_groups:
            for part in group["params"]:
                part.grad = None

    optimizer.register_step_pre_hook(hand_over_gradients)
    optimizer.register_step_post_hook(let_go_of_gradients)


def gather_parameters(optimizer: Optimizer) -> None:
    """Give every rank the parts that others have updated; without a sharded optimizer, nothing. Every rank must call.

    Costs the exchange of all parameters once, and 1 / world size of their memory for a moment. With the all-reduce of
    the gradients, that is one and a half times the traffic of plain DDP.
    """
    wholes = [whole.detach() for group in optimizer.param_groups for whole in group.get("replicated", ())]
    for owner in range(dist.get_world_size()) if wholes else ():
        parts = [_rows_of(owner, whole) for whole in wholes]
        flat = torch.cat([part.flatten() for part in parts])
        dist.broadcast(flat, src=owner)
        received = torch.split(flat, [part.numel() for part in parts])
        torch._foreach_copy_(parts, [rows.view_as(part) for rows, part in zip(received, parts, strict=True)])


def _shard(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a tensor that all ranks hold; a view of it that knows its place in the whole."""
    rows = _rows_of(dist.get_rank(), whole)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def _rows_of(rank: int, whole: Tensor) -> Tensor:
    """The rows along the first dimension that belong to `rank`; the last ranks may have fewer, or none."""
    rows = -(-len(whole) // dist.get_world_size())
    return whole[rank * rows : (rank + 1) * rows]
