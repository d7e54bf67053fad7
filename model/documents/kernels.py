"""Layers with a state whose kernels know documents: they compute all documents of a micro-batch in one call.

transformers hands the ends of documents on to flash-linear-attention, causal-conv1d and mamba-ssm, if they are
installed. Its own torch functions ignore them. So nothing here knows which kernels are right: each layer is tried out.

Shapes: B sequences of a micro-batch, T tokens of a sequence, C channels, S = T and a gap before each document.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import hub_kernels

from model.documents.recurrent import Boundaries, map_leaves, tensors_of

# The argument by which a layer of transformers takes the ends of documents. Kimi Linear has the second name.
ENDS = ("cu_seq_lens_q", "cu_seqlens")
CONVOLUTION = "causal_conv1d_fn"

# Two sequences of documents of these lengths: shorter than a convolution, and longer than a chunk of 64 tokens.
LENGTHS = [3, 70, 23]
# A document is made so many times as large. The others must not notice: the order of sums in a kernel changes bf16 by
# less than 0.01, and a leak changes it by much more.
LARGER = 10.0
ISOLATED = 0.01
# Rounding in bf16, with chunks that start elsewhere.
EQUAL = 0.05


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Let layers of transformers compute with its torch functions: on the CPU and on fake tensors, kernels do not run.

    transformers does that while a model is exported, so it is told that one is.
    """
    with patch.object(hub_kernels, "is_torchdynamo_exporting", lambda: True):
        yield


def in_one_call(forward: Callable[..., Any], ends: str, boundaries: Boundaries, *inputs: Any, **named: Any) -> Any:
    """The results of a module for all documents: as one sequence [1, B x T, ...], with the ends of documents."""
    if not boundaries.groups:
        return forward(*inputs, **named)
    sequences, tokens = boundaries.shape

    def joined(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:2] in ((sequences, tokens), (1, tokens)):
            return value.expand(sequences, *value.shape[1:]).flatten(0, 1)[None]
        return value

    def divided(value: Any) -> Any:
        is_sequence = isinstance(value, Tensor) and value.shape[:2] == (1, sequences * tokens)
        return value.view(sequences, tokens, *value.shape[2:]) if is_sequence else None  # a final state, say

    known = {ends: boundaries.ends, "cu_seqlens_cpu": boundaries.ends_on_cpu, "seq_idx": boundaries.documents}
    parameters = inspect.signature(forward).parameters.values()
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        known = {name: value for name, value in known.items() if name in {each.name for each in parameters}}
    return map_leaves(divided, forward(*map_leaves(joined, inputs), **map_leaves(joined, named) | known))


def compute_in_one_call(model: PreTrainedModel, kinds: dict[type[nn.Module], str]) -> None:
    """Change modules of `kinds`, which restart at documents, in place. See `kinds_in_one_call`. Not compiled."""
    for module in model.modules():
        if ends := kinds.get(type(module)):
            call = partial(in_one_call, partial(type(module).forward, module), ends, model.document_boundaries)
            module.forward = torch.compiler.disable(call)  # type: ignore[no-untyped-call]


def kinds_in_one_call(
    model: PreTrainedModel, kinds: set[type[nn.Module]], device: torch.device, bf16: bool
) -> dict[type[nn.Module], str]:
    """Which of the `kinds` of modules may be computed `in_one_call` on `device`, and their name of the ends.

    `model` is small, has values, and restarts at documents (model/documents/recurrent.py). A module of each kind
    computes packed documents in both ways, with the dtypes of training: outputs and gradients must be equal, and must
    not change in one document if another one does. Where convolutions ignore documents, they are replaced by
    `_convolve_apart`, in the process. Moves `model` to `device`. The first kernels are compiled, which takes a while.
    """
    calls: dict[type[nn.Module], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.setdefault(type(module), (module, inputs, named))

    modules = [module for module in model.to(device).modules() if type(module) in kinds]
    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    lengths = torch.tensor([0, *LENGTHS, *LENGTHS])
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    ids_BT = torch.arange(2 * len(positions_T)).view(2, -1) % model.config.get_text_config().vocab_size
    named = {"input_ids": ids_BT, "position_ids": positions_T.repeat(2, 1), "document_ends": lengths.cumsum(0).int()}
    found = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        try:
            model(**{name: value.to(device) for name, value in named.items()}, use_cache=False)
        except Exception:
            return {}
        finally:
            for hook in hooks:
                hook.remove()
        for kind, (module, inputs, others) in calls.items():
            if way := _way(kind, module, model.document_boundaries, inputs, others):
                found[kind] = way
    return found


def _way(
    kind: type[nn.Module], module: nn.Module, boundaries: Boundaries, inputs: tuple[Any, ...], named: dict[str, Any]
) -> str | None:
    """The name of the ends with which `module` keeps documents apart in one call."""
    namespace = inspect.unwrap(kind.forward).__globals__
    original = namespace.get(CONVOLUTION)
    for convolution in (original, original and partial(_convolve_apart, original)):
        for ends in ENDS:
            if original:
                namespace[CONVOLUTION] = convolution
            call = partial(in_one_call, partial(kind.forward, module), ends, boundaries)
            try:
                if _keeps_apart(call, module.forward, boundaries, inputs, named):
                    return ends
            except Exception:  # it takes no such argument, or has no such kernel
                continue
    if original:
        namespace[CONVOLUTION] = original
    return None


def _keeps_apart(
    call: Callable[..., Any],
    alone: Callable[..., Any],
    boundaries: Boundaries,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
) -> bool:
    """Whether `call` has the outputs and gradients of `alone`, and a document does not change those of others."""
    document_P = boundaries.documents[0]
    size_P = torch.ones(len(document_P), device=document_P.device)
    expected, computed = (_outcome(function, boundaries, inputs, named, size_P) for function in (alone, call))
    for changed in range(vars(boundaries.documents)["number"]):
        others_P = document_P != changed
        again = _outcome(call, boundaries, inputs, named, torch.where(others_P, size_P, LARGER))
        if not all(_near(a[others_P], b[others_P], ISOLATED) for a, b in zip(again, computed, strict=True)):
            return False
    return all(_near(a, b, EQUAL) for a, b in zip(computed, expected, strict=True))


def _outcome(
    function: Callable[..., Any],
    boundaries: Boundaries,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    size_P: Tensor,
) -> list[Tensor]:
    """The first output of `function` and the gradients of its inputs: [B x T, C] each.

    Its inputs are multiplied by `size_P`, fp32 [B x T], and the gradients of its output by its third power, because
    they are not limited by norms and gates.
    """
    size_BT1 = size_P.view(*boundaries.shape, 1)
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        is_state = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
        if not (is_state and value.shape[:2] == boundaries.shape):
            return value
        leaves.append((value.detach() * size_BT1).to(value.dtype).requires_grad_())
        return leaves[-1]

    output = tensors_of(function(*map_leaves(leaf, inputs), **map_leaves(leaf, named)))[0]
    direction = torch.arange(output.numel(), device=output.device).sin().view_as(output) * size_BT1**3
    gradients = torch.autograd.grad((output.float() * direction).sum(), leaves)
    return [tensor.detach().float().flatten(0, 1) for tensor in (output, *gradients)]


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether `a` and `b` are equal in relation to the largest value. Not if one has a NaN."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _convolve_apart(
    convolve: Callable[..., Tensor],
    hidden_BCT: Tensor,
    weight: Tensor,
    *others: Any,
    seq_idx: Tensor | None = None,
    **named: Any,
) -> Tensor:
    """The causal convolution `convolve` with `weight` [C, K] within documents: each follows on a gap of zeros."""
    if seq_idx is None:
        return convolve(hidden_BCT, weight, *others, **named)
    gap, tokens = weight.shape[-1] - 1, hidden_BCT.shape[2]
    places_T = torch.arange(tokens, device=hidden_BCT.device) + gap * seq_idx[0]
    size = tokens + gap * (vars(seq_idx)["number"] - 1)
    hidden_BSC = hidden_BCT.new_zeros(1, size, hidden_BCT.shape[1]).index_copy(1, places_T, hidden_BCT.transpose(1, 2))
    convolved_BCS = convolve(hidden_BSC.transpose(1, 2), weight, *others, **named)
    return convolved_BCS.transpose(1, 2).index_select(1, places_T).transpose(1, 2)
