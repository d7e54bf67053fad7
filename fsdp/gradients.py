"""Gradients between the backward pass and the optimizer."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def set_gradient_sync(wrapped: nn.Module, enabled: bool) -> None:
    """Whether the next backward exchanges gradients. Without, they add up on each rank and cost no communication.

    What adds up without is the full gradient, in fp32: it needs memory for all of it on each rank. Exchanged gradients
    add up in the shards.
    """
    assert isinstance(wrapped, FSDPModule)
    wrapped.set_requires_gradient_sync(enabled)


def clip_grad_norm(wrapped: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a total L2 norm of `max_norm`, and return the norm before: a scalar on the device.

    `max_norm` 0 only measures. Every rank must call: the squares of the shards' norms are summed over ranks.
    """
    parameters = list(wrapped.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    assert isinstance(norm, DTensor)
    full_norm = norm.full_tensor()  # the collective
    nn.utils.clip_grads_with_norm_(parameters, max_norm or float("inf"), full_norm)
    return full_norm
