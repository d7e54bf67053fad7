"""Gradients between the backward pass and the optimizer."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def set_gradient_sync(wrapped: nn.Module, enabled: bool) -> None:
    """Whether the next backward exchanges gradients. Without, they add up on each rank and cost no communication.

    What adds up without is the full gradient, in the dtype that it is reduced in: it needs memory for all of it on each
    rank. Exchanged gradients add up in the shards, in fp32. Without, units that are kept whole after their forward stay
    so after their backward, too: the next micro-step finds them gathered, and cast.
    """
    assert isinstance(wrapped, FSDPModule)
    wrapped.set_requires_gradient_sync(enabled)
    kept: list[FSDPModule] = wrapped.kept_after_forward  # type: ignore[assignment]
    for unit in kept:
        unit.set_reshard_after_backward(enabled, recurse=False)


def grad_norm(wrapped: nn.Module) -> Tensor:
    """The L2 norm of the whole gradient: a scalar on the device, in fp32.

    Every rank must call: the squares of the shards' norms are summed over ranks. What several ranks have alike, as
    replicas do, counts once.
    """
    shards: dict[int, list[Tensor]] = defaultdict(list)  # by the number of ranks that have the same one
    for parameter in wrapped.parameters():
        if isinstance(parameter.grad, DTensor):
            axes = zip(parameter.grad.device_mesh.shape, parameter.grad.placements, strict=True)
            alike = math.prod(size for size, placement in axes if placement.is_replicate())
            shards[alike].append(parameter.grad.to_local())
    squares = torch.stack([nn.utils.get_total_norm(same) ** 2 / alike for alike, same in shards.items()]).sum()
    dist.all_reduce(squares)
    return squares.sqrt()
