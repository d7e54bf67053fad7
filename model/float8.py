"""Matrix products in float8 for the linear modules of the decoder layers.

A float8 product takes half the time of a bf16 product on a GPU that supports it, and returns bf16 or fp32. Scaling is
per tensor and dynamic: each factor is scaled by its largest absolute value to fill the range of its format. Inputs and
weights are e4m3 (4 bits of exponent, 3 of mantissa), gradients are e5m2 (Micikevicius et al. 2022, arXiv 2209.05433,
section 3). Parameters keep their names and fp32. Embedding and head do not change.

A scale depends on its full tensor, so rounding depends on the micro-batch. Gradients of different numbers of ranks
differ by a few percent, instead of 1e-5 without float8.
Shapes: N tokens, I inputs and O outputs of a linear module.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from config.errors import OptionError
from model.layers import compute_dtype, decoder_layers

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # torch._scaled_mm requires dimensions that are multiples of it
CAPABILITY = (8, 9)  # Ada, the first GPUs with float8 products


def compute_in_float8(model: PreTrainedModel) -> None:
    """Let the linear modules of `model`'s decoder layers multiply in float8, in place. Raises OptionError."""
    remedy = "remove --float8; bf16 works for any model"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        raise OptionError(f"float8 true: {torch.cuda.get_device_name()} has no float8 matrix products\n{remedy}")
    found = 0
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            if type(module) is not nn.Linear:
                continue
            if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
                sides = f"{module.in_features} x {module.out_features}"
                raise OptionError(f"float8 true: {name} is {sides}, not multiples of {MULTIPLE}\n{remedy}")
            module.__class__ = Float8Linear
            found += 1
    if not found:
        raise OptionError(f"float8 true: the layers of {type(model).__name__} have no torch.nn.Linear\n{remedy}")


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in float8. compute_in_float8 makes it from a torch.nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., O] for `input` [..., I], in the dtype of torch.autocast if it is on, otherwise of the input."""
        input_NI = input.flatten(0, -2)
        tokens = input_NI.shape[0]
        if tokens % MULTIPLE:  # the gradient of the weight sums over tokens
            input_NI = functional.pad(input_NI, (0, 0, 0, -tokens % MULTIPLE))
        output_NO = _Linear.apply(input_NI, self.weight, compute_dtype(input))[:tokens]  # type: ignore[no-untyped-call]
        output: Tensor = output_NO.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Linear(torch.autograd.Function):
    """input @ weight.T, and the two products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, input_NI: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        input8_NI, input_scale = to_float8(input_NI, E4M3)
        # The input is saved in float8. The weight is saved as it is, because FSDP frees it and gathers it again.
        ctx.save_for_backward(input8_NI, input_scale, weight_OI)
        ctx.dtype = input_NI.dtype
        weight8_OI, weight_scale = to_float8(weight_OI, E4M3)
        return product(input8_NI, weight8_OI.T, input_scale, weight_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, d_output_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        input8_NI, input_scale, weight_OI = ctx.saved_tensors
        gradient8_NO, gradient_scale = to_float8(d_output_NO, E5M2)
        weight8_OI, weight_scale = to_float8(weight_OI, E4M3)
        d_input_NI = product(gradient8_NO, weight8_OI, gradient_scale, weight_scale, d_output_NO.dtype)
        d_weight_OI = product(gradient8_NO.T, input8_NI, gradient_scale, input_scale, weight_OI.dtype)
        return d_input_NI.to(ctx.dtype), d_weight_OI, None


def to_float8(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor scaled to the range of `dtype`, and the factor that undoes the scaling: a scalar in fp32.

    If a value is not finite, the result has NaN, so the step is skipped.
    """
    scale = torch.finfo(dtype).max / tensor.abs().amax().float().clamp(min=1e-30)
    return (tensor.float() * scale).to(dtype), scale.reciprocal()


def product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """left @ right in `dtype`. The kernel needs `left` in row-major and `right` in column-major order.

    `fast` accumulates in less than fp32, which is accurate enough for the forward pass, but not for gradients.
    """
    rows, columns = left.contiguous(), right.T.contiguous().T
    return torch._scaled_mm(
        rows, columns, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )
