"""Linear modules that multiply with a bf16 copy of their weight, and get its gradient in fp32.

torch.autocast casts each weight with a kernel of its own, and a compiled layer does so again for its backward; and the
gradient is rounded to bf16, only to be raised for the fp32 parameter. Those are passes over all weights that no product
needs. What is multiplied is the same; the gradient keeps the digits that the GPU has summed.
Costs two bytes for each of these weights, always there. Shapes: N tokens, I inputs and O outputs of a linear module.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from model.layers import compute_dtype, decoder_layers


def multiply_with_copies(model: PreTrainedModel) -> None:
    """Let the linear modules of `model`'s decoder layers do so, in place: fp32 parameters, under torch.autocast.

    Must be called before layers are compiled. Each backward must come before the next forward, which makes new copies.
    """
    modules = linear_modules(model)
    for module in modules:
        module.__class__ = CopiedLinear
        module.register_buffer("weight_copy", None, persistent=False)
    if modules:  # there are layers without any (GPT-2)
        model.register_forward_pre_hook(_copy_weights)


def linear_modules(model: nn.Module) -> list[nn.Linear]:
    """The linear modules of the decoder layers, each once; not what is like one and does more."""
    modules = dict.fromkeys(module for layer in decoder_layers(model) for module in layer.modules())
    return [module for module in modules if isinstance(module, nn.Linear) and type(module) in (nn.Linear, CopiedLinear)]


def _copy_weights(model: nn.Module, inputs: object) -> None:
    """Before each forward under torch.autocast, all at once. Not once a step: who could say that none has changed?"""
    modules: list[CopiedLinear] = linear_modules(model)  # type: ignore[assignment]
    weights = [module.weight.detach() for module in modules]
    if all(compute_dtype(weight) != weight.dtype for weight in weights):
        for module, weight in zip(modules, weights, strict=True):
            if module.weight_copy is None:
                module.weight_copy = torch.empty_like(weight, dtype=compute_dtype(weight))
        torch._foreach_copy_([module.get_buffer("weight_copy") for module in modules], weights)


class CopiedLinear(nn.Linear):
    """The same module, with another forward: it is never made, but what a torch.nn.Linear becomes."""

    weight_copy: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """[..., O] of `input` [..., I], in the dtype of torch.autocast where that is on, or of the input."""
        dtype = compute_dtype(input)
        copied = self.weight_copy is not None and self.weight_copy.dtype == dtype
        copy_OI = self.weight_copy if copied else self.weight.detach().to(dtype)
        inputs = input.reshape(-1, self.in_features).to(dtype), copy_OI, self.weight, self.bias
        output_NO: Tensor = _MultiplyWithCopy.apply(*inputs)  # type: ignore[no-untyped-call]
        return output_NO.view(*input.shape[:-1], self.out_features)


class _MultiplyWithCopy(torch.autograd.Function):
    """torch.nn.functional.linear with a copy of the weight; the gradient goes to the weight, in its dtype."""

    @staticmethod
    def forward(ctx: Any, input_NI: Tensor, copy_OI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_NI, copy_OI)
        ctx.dtype = weight_OI.dtype
        return functional.linear(input_NI, copy_OI, None if bias_O is None else bias_O.to(copy_OI.dtype))

    @staticmethod
    def backward(ctx: Any, d_output_NO: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
        input_NI, copy_OI = ctx.saved_tensors
        if d_output_NO.is_cuda and d_output_NO.dtype != ctx.dtype:
            d_weight_OI = torch.mm(d_output_NO.T, input_NI, out_dtype=ctx.dtype)
        else:
            d_weight_OI = (d_output_NO.T @ input_NI).to(ctx.dtype)
        d_bias_O = d_output_NO.sum(dim=0, dtype=ctx.dtype) if ctx.needs_input_grad[3] else None
        return d_output_NO @ copy_OI, None, d_weight_OI, d_bias_O
