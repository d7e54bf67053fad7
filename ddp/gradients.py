"""Gradients between the backward pass and the optimizer."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def set_gradient_sync(wrapped: nn.Module, enabled: bool) -> None:
    """Decide whether the next backward pass all-reduces gradients.

    Without the all-reduce, gradients accumulate on each rank, which costs no communication.
    """
    if isinstance(wrapped, DistributedDataParallel):  # a single rank is not wrapped
        wrapped.require_backward_grad_sync = enabled


def grad_norm(wrapped: nn.Module) -> Tensor:
    """The L2 norm of the full gradient: an fp32 scalar on the device.

    It costs no communication, because every rank holds the full gradient.
    """
    return nn.utils.get_total_norm([p.grad for p in wrapped.parameters() if p.grad is not None]).float()
