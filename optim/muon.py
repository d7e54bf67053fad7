"""Muon: the update of a matrix is its momentum with all singular values near 1 (Jordan et al. 2024).

The iteration and its coefficients are from https://kellerjordan.github.io/posts/muon/, and the scale of the update is
from Liu et al. 2025 (arXiv 2502.16982), section 2.2. `torch.optim.Muon` has the same arithmetic, but it needs full
matrices, always rounds to bf16, and cannot skip a step.
Shapes: n matrices of R rows and C columns; W ranks that the rows, or the experts, of a parameter are sharded over.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.layers import Stack

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.AdamW):
    """Muon for the parameter group `matrices`; AdamW, with `settings`, for the parameter groups `others`.

    `stacks` are the parameters of `matrices` that hold the matrices of several experts, by name. Each expert's matrix
    is updated on its own, and a fused gate and up projection as two matrices, as in a dense layer. A fused projection
    of a dense layer (Phi-3) is one matrix, as for torch.optim.Muon.

    The iteration and its communication use `dtype`; momentum has the dtype of the parameters. Muon and AdamW share the
    learning rate and the weight decay, because the update of Muon is scaled to the root mean square of AdamW's update.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        others: list[dict[str, Any]],
        stacks: dict[str, Stack],
        dtype: torch.dtype,
        **settings: Any,
    ) -> None:
        super().__init__([*others, {**matrices, "momentum": MOMENTUM}], **settings)
        self.stacks = stacks
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Every rank must call.

        If `found_inf` is 1, nothing changes. If `grad_scale` is set, gradients are divided by it first. Both attributes
        follow the convention of torch.amp.GradScaler. If matrices are sharded, each of W ranks orthogonalizes one of W
        matrices, which costs two all-to-alls for W matrices. Experts that are sharded are whole on a rank, which
        orthogonalizes its own. Otherwise, every rank orthogonalizes every matrix.
        """
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if "momentum" not in group:
                continue
            # Parameters that are gathered together, by their process group: every rank has the same order.
            batches: dict[dist.ProcessGroup | None, list[tuple[str, Tensor]]] = defaultdict(list)
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    batches[_shard_group(parameter)].append((name, parameter))
            for shard_group, members in batches.items():
                size = shard_group.size() if shard_group else 1
                for first in range(0, len(members), size):
                    self._step_matrices(group, dict(members[first : first + size]), shard_group)

    def _step_matrices(
        self, group: dict[str, Any], parameters: dict[str, Tensor], shard_group: dist.ProcessGroup | None
    ) -> None:
        """Update at most W sharded matrices, or one parameter that needs no other rank."""
        skip = getattr(self, "found_inf", torch.zeros((), device=next(iter(parameters.values())).device))
        scale = getattr(self, "grad_scale", 1.0)
        rate = group["lr"] * (1 - skip)  # a tensor, because a number would synchronize with the GPU
        stacks = [self.stacks.get(name, Stack(tuple(parameter.shape))) for name, parameter in parameters.items()]
        directions = [self._direction(each, group["momentum"], skip, scale) for each in parameters.values()]
        if shard_group:
            shapes = [parameter.shape for parameter in parameters.values()]
            directions = orthogonalize_shards(directions, shapes, stacks, shard_group)
        else:
            directions = [orthogonalize(direction, stack) for direction, stack in zip(directions, stacks, strict=True)]
        for parameter, direction, stack in zip(parameters.values(), directions, stacks, strict=True):
            values = local_shard(parameter)
            longer_side = max(size for dim, size in enumerate(stack.entry, 1) if dim != stack.halves)
            values.mul_(1 - rate * group["weight_decay"])
            values.sub_(direction.to(values.dtype) * (rate * 0.2 * longer_side**0.5))

    def _direction(self, parameter: Tensor, decay: float, skip: Tensor, scale: Tensor | float) -> Tensor:
        """Updates the momentum; returns the Nesterov average of it and the gradient: this rank's shard, in `dtype`."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = local_shard(state["momentum_buffer"])
        assert parameter.grad is not None
        gradient = (local_shard(parameter.grad) / scale).masked_fill_(skip > 0, 0)  # NaN x 0 would be NaN
        momentum.lerp_(gradient, (1 - decay) * (1 - skip))
        return gradient.lerp_(momentum, decay).to(self.dtype)


def orthogonalize(values: Tensor, stack: Stack) -> Tensor:
    """Approximately U V^T for each matrix U S V^T of a parameter: Newton-Schulz steps bring S to between 0.7 and 1.2.

    A step is X -> a X + (b A + c A^2) X with A = X X^T. In total, five steps cost about 20 floating-point operations x
    elements x shorter side, or 30 for a square matrix. `stack` says which matrices `values` holds; there may be none.
    """
    a, b, c = COEFFICIENTS
    matrices_nRC = stack.matrices(values)
    tall = matrices_nRC.shape[1] > matrices_nRC.shape[2]
    wide = matrices_nRC.mT if tall else matrices_nRC
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return stack.values(wide.mT if tall else wide, values.shape)


def orthogonalize_shards(
    shards: list[Tensor], shapes: list[torch.Size], stacks: list[Stack], group: dist.ProcessGroup
) -> list[Tensor]:
    """This rank's shards of at most W orthogonalized parameters of `shapes`. Every rank of `group` must call.

    An all-to-all gathers the shards of parameter r on rank r. A second one scatters the result.
    """
    rank = group.rank()
    shard_sizes = [shard.numel() for shard in shards] + [0] * (group.size() - len(shards))
    gathered_sizes = [0] * group.size()
    if rank < len(shapes):
        gathered_sizes = [rows * shapes[rank][1] for rows in shard_rows(shapes[rank][0], group.size())]
    flat, gathered = torch.cat([shard.flatten() for shard in shards]), shards[0].new_empty(sum(gathered_sizes))
    dist.all_to_all_single(gathered, flat, gathered_sizes, shard_sizes, group=group)
    if rank < len(shapes):
        gathered = orthogonalize(gathered.view(shapes[rank]), stacks[rank]).flatten()
    dist.all_to_all_single(flat, gathered, shard_sizes, gathered_sizes, group=group)
    results = torch.split(flat, shard_sizes[: len(shards)])
    return [result.view_as(shard) for result, shard in zip(results, shards, strict=True)]


def shard_rows(rows: int, ranks: int) -> list[int]:
    """The number of rows in the shard of each rank. The last ranks may have fewer rows, or none."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


def _shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The process group that the rows of a matrix are sharded over; None if this rank holds full matrices."""
    if not isinstance(parameter, DTensor):
        return None
    if parameter.dim() == 3:
        assert not any(placement.is_shard(dim) for placement in parameter.placements for dim in (1, 2)), "cut experts"
        return None
    axis = next(axis for axis, placement in enumerate(parameter.placements) if placement.is_shard(0))
    return parameter.device_mesh.get_group(axis) if parameter.device_mesh.size(axis) > 1 else None


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
