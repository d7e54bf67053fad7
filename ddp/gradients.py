"""Gradients between the backward pass and the optimizer."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def set_gradient_sync(wrapped: nn.Module, enabled: bool) -> None:
    """Whether the next backward exchanges gradients. Without, they add up on each rank and cost no communication."""
    if isinstance(wrapped, DistributedDataParallel):  # one rank alone has none, and nothing to exchange
        wrapped.require_backward_grad_sync = enabled


def clip_grad_norm(wrapped: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a total L2 norm of `max_norm`, and return the norm before: a scalar on the device.

    `max_norm` 0 only measures. Costs no communication: every rank holds the full gradient.
    """
    parameters = list(wrapped.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, max_norm or float("inf"), norm)
    return norm
