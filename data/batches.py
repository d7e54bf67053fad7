"""Which rows a rank reads, and how rows become a batch.

Shapes: B rows, T tokens of the longest row.
"""

import math

import numpy as np
import torch
from torch import Tensor

from data.rows import Row
from model.loss import IGNORED, next_tokens


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


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Rows of up to T tokens as `input_ids` and `labels`, int64 [B, T], shorter ones padded at the end.

    Beside them, int64: `rows` [B], their numbers; `tokens` [B], their lengths without padding; and `targets`, a scalar,
    how many labels are learned. Padding needs no attention mask: causal attention never looks to the right, and the
    labels there are ignored. It goes by length and not by token, because the pad token of many tokenizers is EOS, which
    must be learned. No rows at all give one row without targets, so that a rank that has none left still enters the
    collectives.
    """
    lengths = [len(tokens) for _, tokens in rows]
    shape = (max(1, len(rows)), max([2, *lengths]))
    input_ids_BT, labels_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for index, (_, tokens) in enumerate(rows):
        input_ids_BT[index, : len(tokens)] = tokens
        labels_BT[index, : len(tokens)] = tokens
    return {
        "input_ids": input_ids_BT,
        "labels": labels_BT,
        "rows": torch.tensor([number for number, _ in rows], dtype=torch.int64),
        "tokens": torch.tensor(lengths, dtype=torch.int64),
        "targets": (next_tokens(labels_BT) != IGNORED).sum(),
    }
