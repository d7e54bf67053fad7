"""Context parallelism: split each sequence over the ranks of a group, for sequences that are too long for one GPU.

All ranks of a group read the same sequences, and each rank computes a local sequence: T / N consecutive positions.
Embedding, norms, projections, MLP, head and loss treat each position alone, so they need no communication. Attention
looks at all earlier positions. Before it, an all-to-all redistributes positions by heads: each rank gets all positions
of its own heads (DeepSpeed-Ulysses, Jacobs et al. 2023, section 3.1). Each rank computes the attention of its heads,
and a second all-to-all restores the local sequences. The backward pass has two more all-to-alls. All ranks have equal
work, even in causal attention, because each rank computes the attention of full sequences.

The weights are not split. DDP and FSDP treat these ranks like any others, and average their gradients as usual.

Shapes: B sequences of a micro-batch, T positions of a sequence, H query heads, K key and value heads, E head_dim,
N ranks of the group, P = T / N positions of a local sequence, h and k the query and key heads of one rank.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from parallel.group import Group, pad_sequences

NAME = "context_parallel"

Attention = Callable[..., tuple[Tensor, None]]


def apply_context_parallel(objective: nn.Module, ranks: dist.ProcessGroup, attend: Attention | None = None) -> None:
    """Let `objective` compute this rank's local sequence of each sequence. Must be called before `wrap`.

    Its loss becomes N times the sum over the targets of the local sequence. The mean of that over the group is the loss
    of the full sequences. `ranks` are the group, and `attend` computes attention within documents or windows (None:
    with a mask). model/build.py refuses models whose layers look at other positions outside of attention.
    """
    model: PreTrainedModel = objective.model
    group = Group(ranks.group_name, ranks.size(), ranks.rank())
    objective.register_forward_pre_hook(partial(pad_sequences, group), with_kwargs=True)
    objective.register_forward_pre_hook(partial(_local_sequence, group), with_kwargs=True)
    objective.register_forward_hook(lambda objective, inputs, loss: loss * group.size)
    AttentionInterface.register(NAME, partial(_attend, group, attend))
    model.set_attn_implementation(NAME)


def visible_mask(
    sequences: int, tokens: int, device: torch.device, document_ends: Tensor | None, window: int | None
) -> Tensor:
    """The attention mask, bool [B, 1, T, T]: a position sees itself and earlier ones of its document and window.

    `document_ends` are offsets into all sequences, concatenated: int [documents + 1], from 0 on (None: one document per
    sequence). A `window` counts the position itself (None: no limit).
    """
    position_T = torch.arange(tokens, device=device)
    seen_TT = position_T[:, None] >= position_T
    if window is not None:
        seen_TT = seen_TT & (position_T[:, None] < position_T + window)
    seen_BTT = seen_TT.expand(sequences, tokens, tokens)
    if document_ends is not None:
        offsets = torch.arange(sequences * tokens, device=device)
        document_BT = torch.searchsorted(document_ends, offsets, right=True).view(sequences, tokens)
        seen_BTT = seen_BTT & (document_BT[:, :, None] == document_BT[:, None])
    return seen_BTT[:, None]


def _local_sequence(group: Group, objective: nn.Module, inputs: tuple[()], named: dict[str, Any]) -> Any:
    """Slice each [B, T] to this rank's positions. Labels have one more, because the last position predicts it.

    `document_ends` stay, because attention computes full sequences.
    """
    sequences, tokens = named["input_ids"].shape
    start = tokens // group.size * group.rank
    end = start + tokens // group.size
    positions_BT = named.get("position_ids")
    if positions_BT is None:
        positions_BT = torch.arange(tokens, device=named["input_ids"].device).expand(sequences, tokens)
    local = {
        "input_ids": named["input_ids"][:, start:end],
        "labels": named["labels"][:, start : end + 1],
        "position_ids": positions_BT[:, start:end],
    }
    return inputs, named | local


def _attend(
    group: Group,
    attend: Attention | None,
    module: nn.Module,
    query_BHPE: Tensor,
    key_BKPE: Tensor,
    value_BKPE: Tensor,
    attention_mask: None,
    document_ends: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of local sequences, as an attention function of transformers. The first result is [B, P, H, E]."""
    # Each rank gets an equal number of key heads. A key head that several ranks need is repeated for each of them.
    copies = math.lcm(key_BKPE.shape[1], group.size) // key_BKPE.shape[1]
    key_BKPE, value_BKPE = (heads.repeat_interleave(copies, dim=1) for heads in (key_BKPE, value_BKPE))
    # Under autocast, values are bf16, but norms and rotations in fp32 have made queries and keys fp32.
    sent = [_by_rank(heads.to(value_BKPE.dtype), group) for heads in (query_BHPE, key_BKPE, value_BKPE)]
    received = _AllToAll.apply(torch.cat(sent, dim=2), group)  # type: ignore[no-untyped-call]  # [N, B, h + 2 k, P, E]
    full = received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, h + 2 k, T, E]
    query_BhTE, key_BkTE, value_BkTE = full.split([heads.shape[2] for heads in sent], dim=1)

    sequences, _, tokens, _ = full.shape
    window = sliding_window if sliding_window and sliding_window < tokens else None
    if document_ends is None and window is None:
        attended_BThE = functional.scaled_dot_product_attention(
            query_BhTE, key_BkTE, value_BkTE, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    elif attend is not None:
        if document_ends is None:  # each sequence is one document
            document_ends = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32, device=full.device)
        attended_BThE, _ = attend(module, query_BhTE, key_BkTE, value_BkTE, None, document_ends, scaling, window)
    else:
        mask = visible_mask(sequences, tokens, full.device, document_ends, window)
        queries = query_BhTE.shape[1] // key_BkTE.shape[1]  # per key head
        key_BhTE, value_BhTE = (heads.repeat_interleave(queries, dim=1) for heads in (key_BkTE, value_BkTE))
        attended_BThE = functional.scaled_dot_product_attention(
            query_BhTE, key_BhTE, value_BhTE, mask, scale=scaling
        ).transpose(1, 2)

    received = _AllToAll.apply(_by_rank(attended_BThE, group), group)  # type: ignore[no-untyped-call]  # [N, B, P, h, E]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3), None


def _by_rank(tensor: Tensor, group: Group) -> Tensor:
    """[B, N x S, ...] as [N, B, S, ...]."""
    return tensor.reshape(len(tensor), group.size, -1, *tensor.shape[2:]).movedim(1, 0)


class _AllToAll(torch.autograd.Function):
    """`_all_to_all`. The gradients go back by another all-to-all. Every rank of the group must call."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_to_all(sent, group)

    @staticmethod
    def backward(ctx: Any, d_received: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(d_received, ctx.group), None


def _all_to_all(sent: Tensor, group: Group) -> Tensor:
    """Send entry n of [N, ...] to rank n. Entry n of the result is what rank n sent to this rank."""
    sizes = [1] * group.size
    received = torch.ops._c10d_functional.all_to_all_single(sent.contiguous(), sizes, sizes, group.name)
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    return waited
