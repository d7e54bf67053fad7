"""AdamW with moments in bf16: 4 bytes per parameter instead of 8, rounded stochastically.

In a step, the second moment moves by 1 - beta2, by default 0.1%, of its distance to the squared gradient. Half of the
last bit of bf16 is 0.2% to 0.4% of a number, so rounding to the nearest number would freeze the moment. Stochastic
rounding goes up or down with the probabilities that make the mean exact (Gupta et al. 2015, arXiv 1502.02551).

The random bits are a hash of seed, parameter name, step and position. So all ranks that hold a parameter round it
equally, a resumed run needs no saved state, and no generator is touched: dropout draws what it would draw. A shard of
rows has the bits that these rows have in the full parameter.
"""

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from optim.muon import local_shard

# Elements that one call of `update` takes. Without compilation, it has up to TEMPORARY fp32 numbers for each of them.
SLICE, COMPILED_SLICE, TEMPORARY = 2**22, 2**30, 10


class Bf16AdamW(torch.optim.AdamW):
    """AdamW for fp32 parameters and gradients, with both moments in bf16. The arithmetic of a step is fp32.

    With `compiled`, the update of a parameter is one kernel, which reads and writes each number once.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int, compiled: bool, **settings: Any) -> None:
        super().__init__([{**group, "state_dtype": torch.bfloat16} for group in groups], **settings)
        self.seed = seed
        self.slice = COMPILED_SLICE if compiled else SLICE
        self.update = torch.compile(update, dynamic=True, fullgraph=True) if compiled else update
        self.origins: dict[Tensor, Tensor] = {}  # of each parameter, see _origin

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. The CPU does not synchronize with the GPU after the first step.

        If `found_inf` is 1, nothing changes. If `grad_scale` is set, gradients are divided by it first. Both attributes
        follow the convention of torch.amp.GradScaler.
        """
        for group in self.param_groups:
            named = zip(group["param_names"], group["params"], strict=True)
            trained = {parameter: name for name, parameter in named if parameter.grad is not None}
            if not trained:
                continue
            for parameter, name in trained.items():
                if parameter not in self.origins:
                    self.origins[parameter] = _origin(parameter, name, self.seed)
                if not self.state[parameter]:
                    moments = ("exp_avg", "exp_avg_sq")
                    self.state[parameter] = {one: torch.zeros_like(parameter, dtype=torch.bfloat16) for one in moments}
                    self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
            states = [self.state[parameter] for parameter in trained]
            steps = [state["step"] for state in states]
            device = steps[0].device
            skip = getattr(self, "found_inf", torch.zeros((), device=device)).to(device)
            torch._foreach_add_(steps, [1 - skip] * len(steps))
            origins = torch.stack([self.origins[parameter] for parameter in trained])
            numbers = _numbers(group, torch.stack(steps), getattr(self, "grad_scale", 1.0), origins)
            for parameter, state, row in zip(trained, states, numbers, strict=True):
                gradient = local_shard(parameter.grad).reshape(-1)
                changed = [local_shard(each).view(-1) for each in (parameter, state["exp_avg"], state["exp_avg_sq"])]
                for first in range(0, len(gradient), self.slice):
                    slices = [each[first : first + self.slice] for each in (gradient, *changed)]
                    self.update(slices, _moved(row, first) if first else row, skip)


def update(slices: list[Tensor], numbers: Tensor, skip: Tensor) -> None:
    """Update n elements of a parameter in place. The parameter moves by the moments before rounding.

    `slices` has [n] elements of the gradient, the parameter and its moments; `numbers` is a row of `_numbers`.
    """
    gradient, parameter, exp_avg, exp_avg_sq = slices
    decay, rate, root, weight1, weight2, epsilon, scale, start = numbers.unbind()
    gradient = gradient / scale
    new_exp_avg = exp_avg.float().lerp(gradient, weight1)
    new_exp_avg_sq = exp_avg_sq.float().lerp(gradient * gradient, weight2)
    moved = parameter * decay - rate * new_exp_avg / (new_exp_avg_sq.sqrt() / root + epsilon)
    positions = torch.arange(len(gradient), dtype=torch.int32, device=gradient.device)
    bits = mix(positions + start.view(torch.int32))  # 32 of them: 16 for each moment
    skipped = skip > 0
    parameter.copy_(torch.where(skipped, parameter, moved))
    exp_avg.copy_(torch.where(skipped, exp_avg, round_stochastically(new_exp_avg, bits & 0xFFFF)))
    exp_avg_sq.copy_(torch.where(skipped, exp_avg_sq, round_stochastically(new_exp_avg_sq, bits >> 16 & 0xFFFF)))


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 as bf16, the upper 16 bits of fp32: up if the lower 16 bits and `bits`, from 0 to 65535, have a carry.

    NaN stays what it is, because a carry could make it a number; infinity has no lower bits.
    """
    rounded = (values.view(torch.int32) + bits & -0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def mix(values: Tensor) -> Tensor:
    """A hash of int32: a one-to-one map in which each bit of the result depends on all bits of the value."""
    for _ in range(2):
        values = (values ^ (values >> 16 & 0xFFFF)) * 0x45D9F3B  # the product keeps its lower 32 bits
    return values ^ (values >> 16 & 0xFFFF)


def _numbers(group: dict[str, Any], steps_N: Tensor, grad_scale: Tensor | float, origins: Tensor) -> Tensor:
    """What `update` needs for each of N parameters: fp32 [N, 8], on the device.

    The columns are the factor of weight decay, the learning rate and the root of the second moment with their bias
    corrections, 1 - beta1, 1 - beta2, epsilon, the divisor of gradients, and as the bits of an int32, the hash of the
    shard's first element. A row has 32 bytes because compiled code copies inputs that do not begin at 16 bytes.
    """
    (beta1, beta2), rate, steps = group["betas"], group["lr"], steps_N.double()  # 1 - 0.999 needs many digits
    numbers = torch.empty(len(steps), 8, device=steps.device)
    numbers[:, 0] = 1 - rate * group["weight_decay"]
    numbers[:, 1] = rate / (1 - beta1**steps)
    numbers[:, 2] = (1 - beta2**steps).sqrt()
    for column, value in enumerate((1 - beta1, 1 - beta2, group["eps"], grad_scale), 3):
        numbers[:, column] = value
    names, positions = origins.unbind(dim=1)
    numbers[:, 7] = (mix(names ^ steps.int()) + positions).view(torch.float32)
    return numbers


def _moved(row: Tensor, first: int) -> Tensor:
    """A row of `_numbers` for a slice that begins at element `first` of the shard."""
    # A number that `update` took would have 64 bits in compiled code, which then cannot add it to 32 bits.
    row = row.clone()
    row[7:].view(torch.int32).add_(first)
    return row


def _origin(parameter: Tensor, name: str, seed: int) -> Tensor:
    """Where the random bits of a parameter begin: a hash of seed and name, and the position of this rank's shard.

    int32 [2], on the device. Where columns are split, ranks have overlapping positions, which does no harm.
    """
    position = 0
    if isinstance(parameter, DTensor):
        place = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        position = sum(offset * stride for offset, stride in zip(place[1], parameter.stride(), strict=True))
    origin = torch.tensor([zlib.crc32(f"{seed} {name}".encode()), position])
    return origin.to(torch.int32).to(parameter.device)  # the lower 32 bits
