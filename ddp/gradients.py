"""Gradients between the backward pass and the optimizer."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def set_gradient_sync(wrapped: nn.Module, enabled: bool) -> None:
    """Whether the next backward exchanges gradients. Without, they add up on each rank and cost no communication."""
    if isinstance(wrapped, DistributedDataParallel):  # one rank alone has none, and nothing to exchange
        wrapped.require_backward_grad_sync = enabled


def grad_norm(wrapped: nn.Module) -> Tensor:
    """The L2 norm of the whole gradient: a scalar on the device, in fp32.

    Costs no communication: every rank holds the full gradient.
    """
    return nn.utils.get_total_norm([p.grad for p in wrapped.parameters() if p.grad is not None]).float()
