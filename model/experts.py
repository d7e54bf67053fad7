"""Routed experts of a mixture as grouped matrix products, in the dtype of torch.autocast.

transformers keeps the experts of a layer as 3-D parameters, and calls a function by the name in its configuration
(transformers/integrations/moe.py). `experts_forward` is registered there for all mixtures that use this interface.
Tokens are sorted by their expert, so each expert multiplies consecutive rows. torch.autocast does not reach grouped
products, so this file casts their factors. Parameters keep fp32, and so do their gradients. Float8 (model/float8.py) is
for 2-D matrices and does not change experts.

Only token, routing and first product are saved for the backward pass. The backward pass recomputes sorted tokens, bf16
weights and gates. On a GPU, it recomputes no product.
Shapes: T tokens, K experts of a token, N = T x K rows sorted by expert, E experts, D hidden size, I intermediate size,
G size of the first product: 2 x I if experts have gates, otherwise I.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from model.layers import compute_dtype

NAME = "grouped_products"
ALIGNMENT = 16  # torch's kernel needs rows of a multiple of these bytes


def use_grouped_products(model: PreTrainedModel) -> None:
    """Let the experts of `model` compute with `experts_forward`, in place. Other models do not change."""
    if any(is_experts(module) for module in model.modules()):
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        model.set_experts_implementation(NAME)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a layer as 3-D parameters, with the interface of transformers."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


@contextlib.contextmanager
def skipped_experts(model: nn.Module) -> Iterator[None]:
    """Within this context, experts return zeros, because loops over experts cannot run on fake tensors.

    Experts do not mix positions, and their outputs have the shape of their inputs.
    """
    experts = [module for name, module in model.named_modules() if name.endswith("experts")]
    before = [vars(module).get("forward") for module in experts]
    for module in experts:
        module.forward = lambda hidden, *others: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for module, forward in zip(experts, before, strict=True):
            del module.forward  # the method of its class remains
            if forward is not None:
                module.forward = forward


def experts_forward(module: Any, tokens_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of the outputs of each token's experts: [T, D], in the dtype of `tokens_TD`.

    An index that is `module.num_experts` or more means no expert: it adds nothing.
    """
    count, per_token = module.num_experts, experts_TK.shape[1]
    nobody_TK = experts_TK >= count
    weights_TK = weights_TK.masked_fill(nobody_TK, 0)
    # Few bits are sorted fastest.
    experts_N, order_N = experts_TK.clamp(max=count - 1).flatten().to(torch.int16).sort(stable=True)
    rows_N = torch.arange(len(order_N), device=order_N.device)
    place_N = torch.empty_like(order_N).scatter_(0, order_N, rows_N)  # the row of each (token, expert)
    every_E = torch.arange(count, device=order_N.device, dtype=torch.int32)
    ends_E = torch.searchsorted(experts_N.int(), every_E, right=True, out_int32=True)

    tokens = tokens_TD.to(compute_dtype(tokens_TD))
    routing = order_N, place_N, per_token
    output_ND = grouped_mlp(module, tokens, ends_E, weights_TK.flatten()[order_N], routing)
    return _sum_of_rows(output_ND, *routing).to(tokens_TD.dtype)


def grouped_mlp(
    module: nn.Module,
    tokens_ND: Tensor,
    ends_E: Tensor,
    weights_N: Tensor | None = None,
    routing: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """The outputs of experts for rows that are sorted by expert: [N, D], in the dtype of torch.autocast if it is on.

    `module` has the parameters of E experts. Expert e has the rows from ends_E[e - 1] (0 for the first) to ends_E[e];
    `ends_E` is int32, and its last value is N. `weights_N` multiplies each output. With `routing`, the argument is
    tokens [T, D] instead of rows: this function sorts them, and sorts them again in the backward pass.
    """
    dtype = compute_dtype(tokens_ND)
    first_NG = _recomputed(_first_product, module, tokens_ND, ends_E, routing, dtype)
    return _recomputed(_second_product, module, first_NG, ends_E, weights_N, dtype)


def _recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call `function`, which ends with a matrix product, and save its inputs instead of the factors of the product.

    The recomputation stops before the product, if that is torch's own kernel.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    output: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


def _first_product(
    module: Any, tokens: Tensor, ends_E: Tensor, routing: tuple[Tensor, Tensor, int] | None, dtype: torch.dtype
) -> Tensor:
    rows_ND = tokens if routing is None else _SpreadTokens.apply(tokens, *routing)  # type: ignore[no-untyped-call]
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return _grouped_linear(module, name, rows_ND.to(dtype), ends_E)


def _second_product(
    module: Any, first_NG: Tensor, ends_E: Tensor, weights_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    gated_NI = module._apply_gate(first_NG) if module.has_gate else module.act_fn(first_NG)
    # The product is linear, so the weight of the expert can be applied to its input. The input is smaller, and the
    # output need not be saved.
    if weights_N is not None:
        gated_NI = gated_NI * weights_N[:, None]
    return _grouped_linear(module, "down_proj", gated_NI.to(dtype), ends_E, weights_N)


def _grouped_linear(
    module: Any, name: str, rows: Tensor, ends_E: Tensor, bias_weights_N: Tensor | None = None
) -> Tensor:
    bias = None
    if module.has_bias:  # before the product, so that recomputation can stop there
        numbers_N = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
        bias = getattr(module, f"{name}_bias")[torch.searchsorted(ends_E, numbers_N, right=True)]
        if bias_weights_N is not None:
            bias = bias * bias_weights_N[:, None]
    weight: Tensor = getattr(module, name).to(rows.dtype)
    output = grouped_product(rows, weight if module.is_transposed else weight.mT, ends_E)
    return output if bias is None else output + bias.to(output.dtype)


class _SpreadTokens(torch.autograd.Function):
    """Tokens [T, D] to rows [N, D] in the order of their experts. The backward pass adds without atomic operations."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order_N: Tensor, place_N: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(order_N, place_N)
        ctx.per_token = per_token
        return tokens_TD[order_N // per_token]

    @staticmethod
    def backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Tensor, None, None, None]:
        order_N, place_N = ctx.saved_tensors
        summed_TD = _sum_of_rows(d_rows_ND, order_N, place_N, ctx.per_token)
        return summed_TD.to(d_rows_ND.dtype), None, None, None


class _SumRows(torch.autograd.Function):
    """Rows [N, D] to the sums over the rows of each token: [T, D], in fp32 or more."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_N: Tensor, place_N: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.per_token, ctx.dtype = per_token, rows_ND.dtype
        dtype = torch.promote_types(rows_ND.dtype, torch.float32)
        return rows_ND[place_N].view(-1, per_token, rows_ND.shape[1]).sum(dim=1, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, d_output_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_N,) = ctx.saved_tensors
        return d_output_TD.to(ctx.dtype)[order_N // ctx.per_token], None, None, None


def _sum_of_rows(rows_ND: Tensor, order_N: Tensor, place_N: Tensor, per_token: int) -> Tensor:
    summed: Tensor = _SumRows.apply(rows_ND, order_N, place_N, per_token)  # type: ignore[no-untyped-call]
    return summed


def grouped_product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    """For each expert, its rows @ its weight: [N, O] for `rows` [N, I] and `weights` [E, I, O], of equal dtype.

    Uses torch's kernel where it works: on a GPU, in bf16 and with aligned rows. Otherwise, experts are multiplied one
    after another, and the CPU synchronizes with the GPU.
    """
    aligned = all(size * rows.element_size() % ALIGNMENT == 0 for size in weights.shape[1:])
    if rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and aligned:
        return functional.grouped_mm(rows, weights, offs=ends_E)
    product: Tensor = _product(rows, weights, ends_E)
    return product


@torch.library.custom_op("trainer::grouped_product", mutates_args=())
def _product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    """The products of grouped_product, one expert after another. torch's kernel has no fp32 for fake tensors."""
    output = rows.new_empty(len(rows), weights.shape[2])
    for start, end, weight in _groups(ends_E, weights):
        torch.mm(rows[start:end], weight, out=output[start:end])
    return output


@torch.library.custom_op("trainer::grouped_weight_gradient", mutates_args=())
def _weight_gradient(rows: Tensor, d_output: Tensor, ends_E: Tensor) -> Tensor:
    """For each expert, rows.T @ d_output: [E, I, O]."""
    gradient = rows.new_zeros(len(ends_E), rows.shape[1], d_output.shape[1])
    for start, end, of_expert in _groups(ends_E, gradient):
        torch.mm(rows[start:end].T, d_output[start:end], out=of_expert)
    return gradient


def _groups(ends_E: Tensor, tensors: Tensor) -> list[tuple[int, int, Tensor]]:
    """Start, end and tensor of each expert that has rows. Waits for the GPU."""
    ends = ends_E.tolist()
    groups = zip([0, *ends[:-1]], ends, tensors, strict=True)
    return [(start, end, tensor) for start, end, tensor in groups if end > start]


@_product.register_fake
def _(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@_weight_gradient.register_fake
def _(rows: Tensor, d_output: Tensor, ends_E: Tensor) -> Tensor:
    return rows.new_empty(ends_E.shape[0], rows.shape[1], d_output.shape[1])


def _save_factors(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends_E = ctx.saved_tensors
    d_output = d_output.contiguous()
    return _product(d_output, weights.mT, ends_E), _weight_gradient(rows, d_output, ends_E), None


_product.register_autograd(_product_backward, setup_context=_save_factors)
