"""Muon: the update of a matrix is its momentum with all singular values near 1 (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon/ has the iteration and its coefficients, Liu et al. 2025 (arXiv 2502.16982),
section 2.2, the scale. `torch.optim.Muon` is the same arithmetic; it takes whole matrices alone, always rounds to bf16,
and knows nothing of steps that are to be skipped.
Shapes: R rows and C columns of a matrix; W ranks that have its rows divided among them.
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
    """Muon for `matrices`, one moment each; AdamW, with `settings`, for the parameter groups `others`.

    `dtype` is that of the iteration, and of what is exchanged for it; momentum and parameters stay as they are. One
    learning rate and one weight decay fit both: an update of Muon is scaled to the mean square of AdamW's.
    """

    def __init__(
        self, matrices: dict[str, Any], others: list[dict[str, Any]], dtype: torch.dtype, **settings: Any
    ) -> None:
        super().__init__([*others, {**matrices, "momentum": MOMENTUM}], **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Where `found_inf` is 1, nothing changes. Every rank must call.

        Gradients are divided by `grad_scale` first, where that is set. Both are AdamW's, and torch's.
        Whole matrices alone can be orthogonalized. Of those that are sharded by rows, each of W ranks gets another one
        whole: two exchanges for every W matrices, together twice their elements. Of those that each rank has whole,
        all ranks orthogonalize all.
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
        rate = group["lr"] * (1 - skip)  # a tensor, for which the GPU need not be waited for
        ranks = _sharing_ranks(parameters[0])
        at_a_time = ranks.size() if ranks else 1
        for first in range(0, len(parameters), at_a_time):
            members = parameters[first : first + at_a_time]
            directions = [self._direction(parameter, group["momentum"], skip, scale) for parameter in members]
            if ranks:
                shapes = [parameter.shape for parameter in members]
                directions = orthogonalize_shards(directions, shapes, ranks)
            else:
                directions = [orthogonalize(direction_RC) for direction_RC in directions]
            for parameter, direction_RC in zip(members, directions, strict=True):
                values_RC = _local(parameter)
                values_RC.mul_(1 - rate * group["weight_decay"])
                values_RC.sub_(direction_RC.to(values_RC.dtype) * (rate * 0.2 * max(parameter.shape) ** 0.5))

    def _direction(self, parameter: Tensor, decay: float, skip: Tensor, scale: Tensor | float) -> Tensor:
        """Takes the gradient into the momentum; gives Nesterov's mean of both, of this rank's rows, in `dtype`."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum_RC = _local(state["momentum_buffer"])
        assert parameter.grad is not None
        gradient_RC = (_local(parameter.grad) / scale).masked_fill_(skip > 0, 0)  # a NaN, times nothing, would be one
        momentum_RC.lerp_(gradient_RC, (1 - decay) * (1 - skip))
        return gradient_RC.lerp_(momentum_RC, decay).to(self.dtype)


def orthogonalize(matrix_RC: Tensor) -> Tensor:
    """U V^T where the matrix is U S V^T, nearly: singular values become 0.7 to 1.2, by five steps of Newton and Schulz.

    A step is a X + (b A + c A^2) X with A = X X^T. Costs about 20 floating-point operations for each element times the
    shorter side, and more where the matrix is square: 30.
    """
    a, b, c = COEFFICIENTS
    wide = matrix_RC if len(matrix_RC) <= matrix_RC.shape[1] else matrix_RC.T
    wide = wide / wide.norm().clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if len(matrix_RC) <= matrix_RC.shape[1] else wide.T


def orthogonalize_shards(shards: list[Tensor], shapes: list[torch.Size], ranks: dist.ProcessGroup) -> list[Tensor]:
    """The same for at most W matrices of `shapes`, of which each rank gives and gets its rows. Every rank must call.

    Rank r gets matrix r whole, and sends back what others have of it.
    """
    rank = ranks.rank()
    mine = [shard.numel() for shard in shards] + [0] * (ranks.size() - len(shards))
    whole = [0] * ranks.size()
    if rank < len(shapes):
        whole = [rows * shapes[rank][1] for rows in rows_of_ranks(shapes[rank][0], ranks.size())]
    flat, gathered = torch.cat([shard.flatten() for shard in shards]), shards[0].new_empty(sum(whole))
    dist.all_to_all_single(gathered, flat, whole, mine, group=ranks)
    if rank < len(shapes):
        gathered = orthogonalize(gathered.view(shapes[rank])).flatten()
    dist.all_to_all_single(flat, gathered, mine, whole, group=ranks)
    parts = torch.split(flat, mine[: len(shards)])
    return [part.view_as(shard) for part, shard in zip(parts, shards, strict=True)]


def rows_of_ranks(rows: int, ranks: int) -> list[int]:
    """How many of `rows` each rank has of a sharded tensor; the last ranks may have fewer, or none."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


def _sharing_ranks(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that have the rows of a parameter divided among them, if there are several."""
    if not isinstance(parameter, DTensor):
        return None
    axis = next(axis for axis, placement in enumerate(parameter.placements) if placement.is_shard(0))
    return parameter.device_mesh.get_group(axis) if parameter.device_mesh.size(axis) > 1 else None


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, or all of another one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
