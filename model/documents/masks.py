"""Attention masks of transformers that know the documents of a sequence, whatever the model tells them.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import masking_utils

# The position ids [B, T] of the forward pass that runs, from 0 on in each document. None: no documents to keep apart.
_positions: ContextVar[Tensor | None] = ContextVar("positions", default=None)


def mask_documents(model: nn.Module) -> None:
    """Make every mask that transformers builds for `model` keep documents apart, if the model gets `position_ids`.

    transformers finds packed documents only if a model passes position ids, and no attention mask, to
    `create_causal_mask` and its like. Some models do not: GPT-OSS and AFMoE omit the position ids, OPT, Falcon, BLOOM
    and MPT make an attention mask of ones. Chunked attention (Llama 4) counts its chunks from the start of the
    sequence; here each document counts its own.
    A model that builds masks in another way is not changed. model/documents/trial.py notices that.
    """
    masking_utils._preprocess_mask_arguments = _preprocess_mask_arguments
    masking_utils.chunked_overlay = _chunked_overlay
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


_original_preprocess: Callable[..., Any] = masking_utils._preprocess_mask_arguments
_original_chunked: Callable[..., Any] = masking_utils.chunked_overlay
_find_packed: Callable[..., Any] = masking_utils.find_packed_sequence_indices  # None: one document in each sequence


def _begin(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    _positions.set(named.get("position_ids"))


def _end(model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    _positions.set(None)


def _preprocess_mask_arguments(*arguments: Any, **named: Any) -> tuple[Any, ...]:
    """The arguments of a mask, with the documents of the forward pass that runs."""
    early_exit, attention_mask, packed_BT, *lengths = _original_preprocess(*arguments, **named)
    positions_BT = _positions.get()
    if not early_exit and packed_BT is None and positions_BT is not None and lengths[0] == positions_BT.shape[1]:
        packed_BT = _find_packed(positions_BT)
    return early_exit, attention_mask, packed_BT, *lengths


def _chunked_overlay(chunk_size: int, left_padding: Tensor) -> Callable[..., Any]:
    """Whether two positions are in one chunk. With documents, chunks are counted from the start of the document."""
    positions_BT = _positions.get()
    if positions_BT is None:
        overlay: Callable[..., Any] = _original_chunked(chunk_size, left_padding)
        return overlay
    chunk_BT = positions_BT // chunk_size
    return lambda batch, head, query, key: chunk_BT[batch, query] == chunk_BT[batch, key]
