"""Which rows a rank reads, and how rows become a batch.

Shapes: B rows, T tokens of the longest row.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.sequences import Sequence

Batch = dict[str, Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What the model takes of a micro-batch. From page-locked memory, the copy is not waited for."""
    taken = ("input_ids", "labels", "position_ids", "document_ends", "reference")
    return {name: batch[name].to(device, non_blocking=True) for name in taken if name in batch}


def micro_batches(indices: list[int], size: int, first: int, end: int) -> list[list[int]]:
    """Micro-batches number `first` to `end` - 1 of a rank's `indices`, each of `size` rows.

    Resuming moves `first`: no row is read only to be thrown away.
    """
    return [indices[start : start + size] for start in range(first * size, end * size, size)]


def validation_batches(rows: int, rank: int, world_size: int, size: int) -> list[list[int]]:
    """The batches of validation rows that `rank` evaluates: every row once over all ranks.

    Ranks get the same number of batches, because each forward may be a collective; batches may differ in size by a
    row, and be empty where there are fewer rows than ranks.
    """
    batches = math.ceil(rows / (world_size * size)) * world_size
    return [part.tolist() for part in np.array_split(np.arange(rows), batches)[rank::world_size]]


def collate(rows: list[Sequence], padded_length: int | None = None) -> dict[str, Tensor]:
    """Rows of up to T tokens as `input_ids` and `labels`, int64 [B, T], shorter ones padded at the end.

    Beside them, int64: `rows` [B], their numbers; `tokens` [B], their lengths without padding; `targets`, a scalar, how
    many labels are learned; and of a stream `cursor` [B, 6], where they stand there.

    Padding needs no attention mask: causal attention never looks to the right, and the
    labels there are ignored. It goes by length and not by token, because the pad token of many tokenizers is EOS, which
    must be learned. No rows at all give one row without targets, so that a rank that has none left still enters the
    collectives.

    With `padded_length` T, rows of several documents are padded to T, and the documents are kept apart by two more
    tensors: `position_ids`, int64 [B, T], start at 0 in each document, and `document_ends`, int32 [D], say where each
    document, or padding, ends in the B x T positions in a line, after a first 0.
    """
    lengths = [len(row.tokens) for row in rows]
    shape = (max(1, len(rows)), padded_length or max([2, *lengths]))
    input_ids_BT, labels_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    position_ids_BT, ends = torch.arange(shape[1]).repeat(shape[0], 1), [0]
    for index, (_, tokens, learned, pieces, _) in enumerate(rows):
        input_ids_BT[index, : len(tokens)] = tokens
        labels_BT[index, : len(tokens)] = tokens.where(learned, IGNORE_INDEX)
        start = 0
        for length in pieces:
            if start > 0:
                labels_BT[index, start] = IGNORE_INDEX  # what comes before it is another document
            position_ids_BT[index, start : start + length] = torch.arange(length)
            start += length
            ends.append(index * shape[1] + start)
        position_ids_BT[index, start:] -= start
    batch = {
        "input_ids": input_ids_BT,
        "labels": labels_BT,
        "indices": torch.tensor([row.number for row in rows], dtype=torch.int64),
        "tokens": torch.tensor(lengths, dtype=torch.int64),
        "targets": (next_tokens(labels_BT) != IGNORE_INDEX).sum(),
    }
    if rows and rows[0].cursor:
        batch["cursor"] = torch.tensor([row.cursor for row in rows])
    if padded_length:
        row_ends = range(shape[1], shape[0] * shape[1] + 1, shape[1])
        batch["position_ids"] = position_ids_BT
        batch["document_ends"] = torch.tensor(sorted({*ends, *row_ends}), dtype=torch.int32)
    return batch


def collate_pairs(rows: list[Sequence], reference: Tensor | None = None) -> dict[str, Tensor]:
    """Pairs as a batch of single sequences, all [2B, T]: the chosen one of each of the B rows, then the rejected ones.

    As `collate` does, but for `tokens`, which is [2B], and `targets`: a pair is one target. `reference` [2, R], for all
    R rows of the split, becomes `reference` [2B].
    """
    batch = collate([_piece(row, side) for side in (0, 1) for row in rows])
    batch["indices"] = batch["indices"][: len(rows)]
    batch["targets"] = torch.tensor(len(rows))
    if reference is not None:
        batch["reference"] = reference[:, batch["indices"]].flatten()
    return batch


def _piece(row: Sequence, index: int) -> Sequence:
    """One of the pieces of a row, as a row."""
    end = sum(row.segment_lengths[: index + 1])
    part = slice(end - row.segment_lengths[index], end)
    return Sequence(row.number, row.tokens[part], row.trained_on[part], [row.segment_lengths[index]])


IGNORE_INDEX = -100

"""The label of a position that is no target: padding, or text that is given and not learned."""


def next_tokens(labels_BT: Tensor) -> Tensor:
    """What position t has to predict: label t + 1; nothing at the last position of a row."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
