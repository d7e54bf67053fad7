"""Attention within documents, where several of them share a row, and what that costs where none do.

Shapes: B rows of a micro-batch, H heads of queries, K heads of keys and values, T tokens of a row, E entries of a head.
"""

import inspect
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel, masking_utils

from config.errors import first_line
from model.layers import decoder_layers

NAME = "within_documents"

CAN = inspect.signature(varlen_attn).parameters.keys()  # it has learned to look back a window, and to share keys

LOOKS_BACK = {"scale", "window_size"} <= CAN

# What transformers passes on to attention functions without a meaning for them, or with one that is understood here.
UNDERSTOOD = {
    "scaling",
    "document_ends",
    "use_cache",
    "position_ids",
    "output_router_logits",
    "output_attentions",
}


def attend_within_documents(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Make `model` attend within documents without computing what lies between them, where that can be done.

    That is flash attention over sequences of variable length: on a GPU, in bf16. Elsewhere, and for a model whose
    attention is `unusual`, transformers gives scaled_dot_product_attention a mask of [B, 1, T, T], which it makes from
    position ids that start again; the result is the same.
    """
    usual = model.config.get_text_config()._attn_implementation == "sdpa"
    if usual and supports_variable_length(device, torch.bfloat16 if bf16 else torch.float32) and not unusual(model):
        AttentionInterface.register(NAME, attend)
        model.set_attn_implementation(NAME)


def supports_variable_length(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` works there."""
    return LOOKS_BACK and device.type == "cuda" and dtype == torch.bfloat16


def unusual(model: PreTrainedModel) -> str:
    """What the attention of `model` is beside softmax over what comes before, in a window or not; "" for nothing.

    In words, and found by trying: what does each layer give the attention function that its configuration names? One of
    ours would not see what else the model does, or ignore what else it is given. Costs up to a second, and no memory.
    """
    try:
        calls = _calls_of_attention(model)
    except Exception as error:
        return f"it does not run without values: {first_line(error)}"
    layers, kinds = len(decoder_layers(model)), getattr(model.config.get_text_config(), "layer_types", None) or ()
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {min(other)}"
    if len(calls) != layers:
        return f"its {layers} layers call an attention function that can be exchanged {len(calls)} times"
    if given := set().union(*(call.given for call in calls)):
        return f"its attention is given {min(given)}"
    windows = sum(call.window is not None for call in calls)
    if kinds and windows != list(kinds).count("sliding_attention"):
        return f"{windows} of its layers pass on their window"
    return ""


class Call(NamedTuple):
    """What a layer has given its attention function, beside queries, keys and values as usual."""

    window: int | None
    given: set[str]  # what no attention function of ours understands, in words


def _calls_of_attention(model: PreTrainedModel) -> list[Call]:
    """Those of one forward, on tensors that have shapes and no values. The model is left as it was."""
    calls: list[Call] = []

    def record(
        module: nn.Module,
        query_BHTE: Tensor,
        key_BKTE: Tensor,
        value_BKTE: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        given = {
            name
            for name, value in others.items()
            if value is not None and value is not False and name not in UNDERSTOOD
        }
        given -= {"dropout"} if others.get("dropout") == 0 else set()
        given |= {"a mask of its own"} if attention_mask is not None else set()
        given |= {"values of another width"} if value_BKTE.shape[-1] != query_BHTE.shape[-1] else set()
        given |= {"no ends of documents"} if others.get("document_ends") is None else set()
        calls.append(Call(sliding_window, given))
        return query_BHTE.new_zeros(*query_BHTE.transpose(1, 2).shape[:3], value_BKTE.shape[-1]), None

    experts = [module for name, module in model.named_modules() if name.endswith("experts")]
    before, device = model.config._attn_implementation, next(model.parameters()).device
    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print what is caught
    try:
        for module in experts:  # they do not run so, and look at one position at a time
            module.forward = lambda hidden, *others: torch.zeros_like(hidden)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=device)
            positions_BT = torch.arange(2, device=device)[None]
            model(input_ids=ids_BT, position_ids=positions_BT, document_ends=ids_BT[0], use_cache=False)
    finally:
        model.set_attn_implementation(before)
        for module in experts:
            del module.forward
    return calls


def expect_one_document_per_sequence() -> None:
    """For this process: no row holds several documents, so that transformers need not look for them.

    In each forward it would compare the positions of a row, and ask the GPU for the answer. To wait for that is to let
    the GPU run dry, once in each micro-step: the next kernels are only then sent.
    """
    masking_utils.find_packed_sequence_indices = lambda position_ids: None


def attend(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: None,
    document_ends: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' attention functions; the first result is [B, T, H, E].

    All rows are one line of B x T positions; `document_ends`, int32 [D + 1], says where each document ends there.
    """
    rows, tokens = query_BHTE.shape[0], query_BHTE.shape[2]
    # Norms and rotations in fp32 have raised queries and keys to it; under autocast, values are bf16.
    query, key, value = (
        part.to(value_BKTE.dtype).transpose(1, 2).flatten(0, 1) for part in (query_BHTE, key_BKTE, value_BKTE)
    )
    sharing: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in CAN:
        sharing, groups = {}, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    window = (sliding_window - 1 if sliding_window else -1, 0)  # to the left, and none to the right: causal
    attended: Any = varlen_attn(
        query, key, value, document_ends, document_ends, tokens, tokens, scale=scaling, window_size=window, **sharing
    )
    return attended.unflatten(0, (rows, tokens)), None
