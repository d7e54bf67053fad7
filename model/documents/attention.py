"""Attention within documents, for sequences that hold several documents.

Shapes: B sequences of a micro-batch, T tokens of a sequence, H query heads, K key and value heads, E head_dim.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel, masking_utils

from config.errors import first_line
from model.documents.kernels import torch_kernels
from model.documents.trial import position_obstacle
from model.experts import skipped_experts
from model.layers import decoder_layers

NAME = "within_documents"

# torch 2.13 supports grouped-query attention in varlen_attn, and torch 2.11 does not.
VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

# Arguments that transformers passes to attention functions, and that `attend` implements or may ignore.
KNOWN_ARGUMENTS = {
    "scaling",
    "sliding_window",
    "document_ends",
    "use_cache",
    "position_ids",
    "output_router_logits",
    "output_attentions",
}


def attend_within_documents(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Make `model` skip attention between documents if it can: on a GPU, in bf16, with variable-length flash attention.

    Otherwise, or if the model has an `attention_obstacle`, transformers builds a mask [B, 1, T, T] from the position
    ids for scaled_dot_product_attention. The result is equal, but slower and larger.
    """
    sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
    dtype = torch.bfloat16 if bf16 else torch.float32
    if sdpa and supports_variable_length(device, dtype) and not attention_obstacle(model):
        AttentionInterface.register(NAME, attend)
        model.set_attn_implementation(NAME)


def supports_variable_length(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` works on `device` in `dtype`."""
    return device.type == "cuda" and dtype == torch.bfloat16


def attention_obstacle(model: PreTrainedModel) -> str:
    """Why `attend` cannot replace the attention of `model`, as text; "" if it can.

    `attend` is causal softmax attention, optionally with a sliding window. Runs the model on fake tensors and records
    the arguments of each attention call, which costs up to a second and no memory. Then tries `attend` in a small model
    with values (model/documents/trial.py), which costs about another second.
    """
    try:
        calls = _attention_calls(model)
    except Exception as error:
        return f"it does not run on fake tensors: {first_line(error)}"
    layers = len(decoder_layers(model))
    if len(calls) != layers:
        return f"its {layers} layers call a replaceable attention function {len(calls)} times"
    if obstacles := set().union(*calls):
        return f"its attention function has {min(obstacles)}"
    return position_obstacle(model.config, model.is_remote_code())


def expect_one_document_per_sequence() -> None:
    """Stop transformers in this process from searching for packed documents, because no sequence has several.

    The search would compare position ids in each forward pass and synchronize the CPU with the GPU. The GPU would be
    idle until the CPU launches the next kernels.
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
    """Causal attention within documents, in bf16 on a GPU: an attention function of transformers.

    `document_ends`, int32 [number of documents + 1], holds 0 and the end of each document among all B x T positions.
    `sliding_window` counts positions, including the query's own. Returns [B, T, H, E] and no attention weights.
    """
    sequences, tokens = query_BHTE.shape[0], query_BHTE.shape[2]
    # Under autocast, values are bf16, but fp32 norms and rotary embeddings made queries and keys fp32.
    query, key, value = (
        tensor.to(value_BKTE.dtype).transpose(1, 2).flatten(0, 1) for tensor in (query_BHTE, key_BKTE, value_BKTE)
    )
    gqa: dict[str, Any] = {"enable_gqa": True}
    if not VARLEN_HAS_GQA:
        gqa, groups = {}, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    window = (sliding_window - 1 if sliding_window else -1, 0)  # left and right of the query; 0 to the right is causal
    attended: Any = varlen_attn(
        query, key, value, document_ends, document_ends, tokens, tokens, scale=scaling, window_size=window, **gqa
    )
    return attended.unflatten(0, (sequences, tokens)), None


def _attention_calls(model: PreTrainedModel) -> list[set[str]]:
    """The calls of the attention function in one forward pass: what `attend` does not implement of each, as text.

    The forward pass is on fake tensors. The model is restored afterwards.
    """
    calls: list[set[str]] = []

    def record(
        module: nn.Module,
        query_BHTE: Tensor,
        key_BKTE: Tensor,
        value_BKTE: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        obstacles = {
            f"the argument {name}"
            for name, value in others.items()
            if value is not None and value is not False and name not in KNOWN_ARGUMENTS
        }
        obstacles -= {"the argument dropout"} if others.get("dropout") == 0 else set()
        obstacles |= {"its own mask"} if attention_mask is not None else set()
        obstacles |= {"another head_dim for values"} if value_BKTE.shape[-1] != query_BHTE.shape[-1] else set()
        obstacles |= {"no document_ends"} if others.get("document_ends") is None else set()
        calls.append(obstacles)
        return query_BHTE.new_zeros(*query_BHTE.transpose(1, 2).shape[:3], value_BKTE.shape[-1]), None

    before, device = model.config._attn_implementation, next(model.parameters()).device
    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print caught errors
    try:
        with skipped_experts(model), torch_kernels(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=device)
            positions_BT = torch.arange(2, device=device)[None]
            model(input_ids=ids_BT, position_ids=positions_BT, document_ends=ids_BT[0], use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return calls
