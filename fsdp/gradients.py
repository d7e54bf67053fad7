"""Gradients between the backward pass and the optimizer."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def set_gradient_sync(wrapped: nn.Module, enabled: bool) -> None:
    """Decide whether the next backward pass reduce-scatters gradients.

    Without the reduce-scatter, gradients accumulate on each rank, which costs no communication. Each rank then needs
    memory for the full gradient, in the dtype of the reduction. Reduced gradients accumulate in the shards, in fp32.
    Units that are not resharded after their forward pass then also stay gathered after their backward pass, so the next
    micro-step does not gather and cast them again.
    """
    assert isinstance(wrapped, FSDPModule)
    wrapped.set_requires_gradient_sync(enabled)
    gathered: list[FSDPModule] = wrapped.gathered_after_forward  # type: ignore[assignment]
    for unit in gathered:
        unit.set_reshard_after_backward(enabled, recurse=False)


def grad_norm(wrapped: nn.Module) -> Tensor:
    """The L2 norm of the full gradient: an fp32 scalar on the device. Every rank must call.

    All-reduces the sum of the squared norms of the shards. A shard that several ranks replicate counts once.
    """
    shards: dict[int, list[Tensor]] = defaultdict(list)  # by the number of their replicas
    for parameter in wrapped.parameters():
        if isinstance(parameter.grad, DTensor):
            axes = zip(parameter.grad.device_mesh.shape, parameter.grad.placements, strict=True)
            replicas = math.prod(size for size, placement in axes if placement.is_replicate())
            shards[replicas].append(parameter.grad.to_local())
    squares = torch.stack([nn.utils.get_total_norm(same) ** 2 / replicas for replicas, same in shards.items()]).sum()
    dist.all_reduce(squares)
    return squares.sqrt()
