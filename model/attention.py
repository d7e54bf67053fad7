"""Attention within documents, where several of them share a row, and what that costs where none do.

Shapes: B rows of a micro-batch, H heads of queries, K heads of keys and values, T tokens of a row, E entries of a head.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel, masking_utils

NAME = "within_documents"
CAN = inspect.signature(varlen_attn).parameters.keys()  # it has learned to look back a window, and to share keys


def attend_within_documents(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Make `model` attend within documents without computing what lies between them, where that can be done.

    That is flash attention over sequences of variable length: on a GPU, in bf16. Elsewhere, and for a model whose
    attention has dropout or caps its scores, transformers gives scaled_dot_product_attention a mask of [B, 1, T, T],
    which it makes from position ids that start again; the result is the same.
    """
    config = model.config.get_text_config()
    plain = not getattr(config, "attention_dropout", 0.0) and not getattr(config, "attn_logit_softcapping", None)
    if (
        {"scale", "window_size"} <= CAN
        and device.type == "cuda"
        and bf16
        and plain
        and config._attn_implementation == "sdpa"
    ):
        AttentionInterface.register(NAME, attend)
        model.set_attn_implementation(NAME)


def expect_one_document_a_row() -> None:
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
