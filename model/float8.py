"""Matrix products in float8: what goes into the linear modules of the decoder layers is rounded to one byte.

A product of two matrices of bytes takes half the time of bf16's on a GPU that has it, and gives bf16 or fp32. Each
factor is scaled first, by the largest of its absolute values, so that it fills the range of its format, and the product
is scaled back: per tensor, anew each time. Inputs and weights are e4m3 (4 bits of exponent, 3 of mantissa), gradients
e5m2 (Micikevicius et al. 2022, arXiv 2209.05433, section 3). What is summed, normed or kept is as it was: parameters
have their names and fp32, embedding and head are not touched.

A scale depends on all that is in its tensor. So other micro-batches round otherwise, and what is the same for any
number of ranks to 1e-5 elsewhere is the same here to a few percent of the gradient.
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

MULTIPLE = 16  # what torch._scaled_mm wants of each side of a factor that it sums along, or lays out in columns

CAPABILITY = (8, 9)  # the first GPUs with such products: Ada and Hopper


def compute_in_float8(model: PreTrainedModel) -> None:
    """Let the linear modules of `model`'s decoder layers multiply in float8, in place. Raises OptionError."""
    remedy = "leave it out; bf16 computes any model"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        raise OptionError(f"float8 true: {torch.cuda.get_device_name()} has no such matrix products\n{remedy}")
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
    """The same module, with another forward: it is never made, but what a torch.nn.Linear becomes."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., O] of `input` [..., I], in the dtype of torch.autocast where that is on, or of the input."""
        input_NI = input.flatten(0, -2)
        tokens = input_NI.shape[0]
        if tokens % MULTIPLE:  # the gradient of the weight is a sum along them
            input_NI = functional.pad(input_NI, (0, 0, 0, -tokens % MULTIPLE))
        output_NO = _Linear.apply(input_NI, self.weight, compute_dtype(input))[:tokens]  # type: ignore[no-untyped-call]
        output: Tensor = output_NO.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Linear(torch.autograd.Function):
    """input @ weight.T, and both products of its backward."""

    @staticmethod
    def forward(ctx: Any, input_NI: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        input8_NI, input_scale = to_float8(input_NI, E4M3)
        # Of the input, what is kept is one byte. Of the weight, nothing: FSDP frees it, and gathers it again.
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
    """The tensor in `dtype`, scaled to its range, and what gives it back when multiplied: a scalar in fp32.

    What is not finite makes all of it NaN, so that the step is skipped.
    """
    scale = torch.finfo(dtype).max / tensor.abs().amax().float().clamp(min=1e-30)
    return (tensor.float() * scale).to(dtype), scale.reciprocal()


def product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """left @ right in `dtype`. The GPU wants rows of the one and columns of the other next to each other.

    `fast` sums in less than fp32, which is enough for the forward, but not for gradients.
    """
    rows, columns = left.contiguous(), right.T.contiguous().T
    return torch._scaled_mm(
        rows, columns, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )
