"""Divide each row among the ranks of a group, for rows that are too long for one GPU: context parallelism.

Shapes: B rows of a micro-batch, T tokens of a row, H heads of queries, K heads of keys and values, E entries of a head;
N ranks of the group; P = T / N, the positions of one rank; h = H / N and k, the heads of one rank.

All ranks of the group read the same rows, and each computes a piece of them: embedding, norms, projections, the wider
layer, head and loss look at one position at a time, and so need nothing of the others. Attention looks at all that come
before. There, ranks exchange positions for heads (Jacobs et al. 2023, section 3.1): each gives away its positions of
the others' heads, and gets all positions of its own. It attends alone, as if there were no group, and what comes out
goes back: two all-to-alls a layer, and as many in its backward. A rank of the group has as much to do as the others,
where pieces of one causal attention would not be alike.

Weights know nothing of it: for DDP and FSDP, these are ranks like all others, and gradients are exchanged as ever.
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
    """Let `objective` compute this rank's piece of each row that it is given. Must be called before wrapping.

    Its loss becomes N times the sum over the targets of that piece, the mean over the group of which is what each would
    have computed of whole rows. model/build.py refuses models for which this would be something else.
    """
    model: PreTrainedModel = objective.model
    group = Group(ranks.group_name, ranks.size(), ranks.rank())
    objective.register_forward_pre_hook(partial(pad_sequences, group), with_kwargs=True)
    objective.register_forward_pre_hook(partial(_take_piece, group), with_kwargs=True)
    objective.register_forward_hook(lambda objective, inputs, loss: loss * group.size)
    AttentionInterface.register(NAME, partial(_attend, group, attend))
    model.set_attn_implementation(NAME)


def _take_piece(group: Group, objective: nn.Module, inputs: tuple[()], named: dict[str, Any]) -> Any:
    """This rank's positions of each tensor [B, T]; of labels one more, because its last position predicts it.

    `document_ends` are for attention, which has whole rows.
    """
    rows, tokens = named["input_ids"].shape
    start = tokens // group.size * group.rank
    end = start + tokens // group.size
    positions_BT = named.get("position_ids")
    if positions_BT is None:
        positions_BT = torch.arange(tokens, device=named["input_ids"].device).expand(rows, tokens)
    pieces = {
        "input_ids": named["input_ids"][:, start:end],
        "labels": named["labels"][:, start : end + 1],
        "position_ids": positions_BT[:, start:end],
    }
    return inputs, named | pieces


class _Exchange(torch.autograd.Function):
    """Of [N, ...], piece n goes to rank n, and in its place comes what that has for this one. Every rank must call.

    What each gets is what another gave: the gradients go back by the same exchange.
    """

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _exchange(pieces, group)

    @staticmethod
    def backward(ctx: Any, d_pieces: Tensor) -> tuple[Tensor, None]:
        return _exchange(d_pieces, ctx.group), None


def _exchange(pieces: Tensor, group: Group) -> Tensor:
    each = [1] * group.size
    exchanged = torch.ops._c10d_functional.all_to_all_single(pieces.contiguous(), each, each, group.name)
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(exchanged)
    return waited


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
    """The signature is that of transformers' attention functions; the first result is [B, P, H, E]."""
    # Each rank gets as many heads of keys; one that several ranks need goes to each of them.
    copies = math.lcm(key_BKPE.shape[1], group.size) // key_BKPE.shape[1]
    key_BKPE, value_BKPE = (part.repeat_interleave(copies, dim=1) for part in (key_BKPE, value_BKPE))
    # Norms and rotations in fp32 have raised queries and keys to it; under autocast, values are bf16.
    parts = [_by_rank(part.to(value_BKPE.dtype), group) for part in (query_BHPE, key_BKPE, value_BKPE)]
    pieces = _Exchange.apply(torch.cat(parts, dim=2), group)  # type: ignore[no-untyped-call]  # [N, B, h + 2 k, P, E]
    whole = pieces.permute(1, 2, 0, 3, 4).flatten(2, 3)  # all positions, and of all heads those of this rank
    query_BhTE, key_BkTE, value_BkTE = whole.split([part.shape[2] for part in parts], dim=1)

    rows, _, tokens, _ = whole.shape
    window = sliding_window if sliding_window and sliding_window < tokens else None
    if document_ends is None and window is None:
        attended_BThE = functional.scaled_dot_product_attention(
            query_BhTE, key_BkTE, value_BkTE, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    elif attend is not None:
        if document_ends is None:  # each row is one
            document_ends = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=whole.device)
        attended_BThE, _ = attend(module, query_BhTE, key_BkTE, value_BkTE, None, document_ends, scaling, window)
    else:
        mask = visible_mask(rows, tokens, whole.device, document_ends, window)
        groups = query_BhTE.shape[1] // key_BkTE.shape[1]
        key_BhTE, value_BhTE = (part.repeat_interleave(groups, dim=1) for part in (key_BkTE, value_BkTE))
        attended_BThE = functional.scaled_dot_product_attention(
            query_BhTE, key_BhTE, value_BhTE, mask, scale=scaling
        ).transpose(1, 2)

    pieces = _Exchange.apply(_by_rank(attended_BThE, group), group)  # type: ignore[no-untyped-call]  # [N, B, P, h, E]
    return pieces.permute(1, 2, 0, 3, 4).flatten(2, 3), None


def _by_rank(parts: Tensor, group: Group) -> Tensor:
    """[B, N x S, ...] as [N, B, S, ...]."""
    return parts.reshape(len(parts), group.size, -1, *parts.shape[2:]).movedim(1, 0)


def visible_mask(
    rows: int, tokens: int, device: torch.device, document_ends: Tensor | None, window: int | None
) -> Tensor:
    """Which positions each position sees, bool [B, 1, T, T]: those before it, in its document and in the window."""
    position_T = torch.arange(tokens, device=device)
    seen_TT = position_T[:, None] >= position_T
    if window is not None:
        seen_TT = seen_TT & (position_T[:, None] < position_T + window)
    seen_BTT = seen_TT.expand(rows, tokens, tokens)
    if document_ends is not None:
        in_a_line = torch.arange(rows * tokens, device=device)
        document_BT = torch.searchsorted(document_ends, in_a_line, right=True).view(rows, tokens)
        seen_BTT = seen_BTT & (document_BT[:, :, None] == document_BT[:, None])
    return seen_BTT[:, None]
