"""Muon: the update of a matrix is its momentum with all singular values near 1 (Jordan et al. 2024).

The iteration and its coefficients are from https://kellerjordan.github.io/posts/muon/, and the scale of the update is
from Liu et al. 2025 (arXiv 2502.16982), section 2.2. `torch.optim.Muon` has the same arithmetic, but it needs full
matrices, always rounds to bf16, and cannot skip a step.
Shapes: R rows and C columns of a matrix; W ranks that its rows are sharded over.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.AdamW):
    """Muon for the parameter group `matrices`; AdamW, with `settings`, for the parameter groups `others`.

    The iteration and its communication use `dtype`; momentum has the dtype of the parameters. Muon and AdamW share the
    learning rate and the weight decay, because the update of Muon is scaled to the root mean square of AdamW's update.
    """

    def __init__(
        self, matrices: dict[str, Any], others: list[dict[str, Any]], dtype: torch.dtype, **settings: Any
    ) -> None:
        super().__init__([*others, {**matrices, "momentum": MOMENTUM}], **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Every rank must call.

        If `found_inf` is 1, nothing changes. If `grad_scale` is set, gradients are divided by it first. Both attributes
        follow the convention of torch.amp.GradScaler. If matrices are sharded, each of W ranks orthogonalizes one of W
        matrices, which costs two all-to-alls for W matrices. Otherwise, every rank orthogonalizes every matrix.
        """
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group, [parameter for parameter in group["params"] if parameter.grad is not None])

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        skip = getattr(self, "found_inf", torch.zeros((), device=parameters[0].device))
        scale = getattr(self, "grad_scale", 1.0)
        rate = group["lr"] * (1 - skip)  # a tensor, because a number would synchronize with the GPU
        shard_group = _shard_group(parameters[0])
        count = shard_group.size() if shard_group else 1
        for first in range(0, len(parameters), count):
            members = parameters[first : first + count]
            directions = [self._direction(parameter, group["momentum"], skip, scale) for parameter in members]
            if shard_group:
                shapes = [parameter.shape for parameter in members]
                directions = orthogonalize_shards(directions, shapes, shard_group)
            else:
                directions = [orthogonalize(direction_RC) for direction_RC in directions]
            for parameter, direction_RC in zip(members, directions, strict=True):
                values_RC = _local(parameter)
                values_RC.mul_(1 - rate * group["weight_decay"])
                values_RC.sub_(direction_RC.to(values_RC.dtype) * (rate * 0.2 * max(parameter.shape) ** 0.5))

    def _direction(self, parameter: Tensor, decay: float, skip: Tensor, scale: Tensor | float) -> Tensor:
        """Updates the momentum; returns the Nesterov average of it and the gradient: this rank's shard, in `dtype`."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum_RC = _local(state["momentum_buffer"])
        assert parameter.grad is not None
        gradient_RC = (_local(parameter.grad) / scale).masked_fill_(skip > 0, 0)  # NaN x 0 would be NaN
        momentum_RC.lerp_(gradient_RC, (1 - decay) * (1 - skip))
        return gradient_RC.lerp_(momentum_RC, decay).to(self.dtype)


def orthogonalize(matrix_RC: Tensor) -> Tensor:
    """Approximately U V^T for a matrix U S V^T: five Newton-Schulz steps bring singular values to between 0.7 and 1.2.

    A step is X -> a X + (b A + c A^2) X with A = X X^T. In total, they cost about 20 floating-point operations x
    elements x shorter side, or 30 for a square matrix.
    """
    a, b, c = COEFFICIENTS
    wide = matrix_RC if len(matrix_RC) <= matrix_RC.shape[1] else matrix_RC.T
    wide = wide / wide.norm().clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if len(matrix_RC) <= matrix_RC.shape[1] else wide.T


def orthogonalize_shards(shards: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's shards of at most W orthogonalized matrices of `shapes`. Every rank of `group` must call.

    An all-to-all gathers the shards of matrix r on rank r. A second one scatters the result.
    """
    rank = group.rank()
    shard_sizes = [shard.numel() for shard in shards] + [0] * (group.size() - len(shards))
    gathered_sizes = [0] * group.size()
    if rank < len(shapes):
        gathered_sizes = [rows * shapes[rank][1] for rows in shard_rows(shapes[rank][0], group.size())]
    flat, gathered = torch.cat([shard.flatten() for shard in shards]), shards[0].new_empty(sum(gathered_sizes))
    dist.all_to_all_single(gathered, flat, gathered_sizes, shard_sizes, group=group)
    if rank < len(shapes):
        gathered = orthogonalize(gathered.view(shapes[rank])).flatten()
    dist.all_to_all_single(flat, gathered, shard_sizes, gathered_sizes, group=group)
    results = torch.split(flat, shard_sizes[: len(shards)])
    return [result.view_as(shard) for result, shard in zip(results, shards, strict=True)]


def shard_rows(rows: int, ranks: int) -> list[int]:
    """The number of rows in the shard of each rank. The last ranks may have fewer rows, or none."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


def _shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The process group that the rows of a parameter are sharded over; None if this rank holds the full parameter."""
    if not isinstance(parameter, DTensor):
        return None
    axis = next(axis for axis, placement in enumerate(parameter.placements) if placement.is_shard(0))
    return parameter.device_mesh.get_group(axis) if parameter.device_mesh.size(axis) > 1 else None


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
