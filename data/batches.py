"""Which sequences a rank reads, and how sequences become a batch.

Shapes: B sequences, T tokens of the longest of them.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DistributedSampler

from data.sequences import Integers, Sequence

Batch = dict[str, Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors that the model takes, on `device`. The CPU does not wait for a copy from pinned memory.

    `document_ends` keeps its CPU tensor as the attribute `on_cpu`, for layers that restart at documents: they slice on
    the CPU (model/documents/recurrent.py). DDP and FSDP pass a tensor that is on the device as it is, with its
    attributes.
    """
    taken = ("input_ids", "labels", "position_ids", "document_ends", "reference", "tokens")
    moved = {name: batch[name].to(device, non_blocking=True) for name in taken if name in batch}
    if "document_ends" in moved and device.type != "cpu":
        moved["document_ends"].on_cpu = batch["document_ends"]  # type: ignore[attr-defined]
    return moved


def draw(sampler: DistributedSampler[int], numbers: Integers) -> Integers:
    """numbers[list(sampler)], of a sampler that shuffles and drops the rest, without a list of Python's integers.

    Such a list of a terabyte takes half a minute and gigabytes on each rank. This is the permutation that the sampler
    draws, of 4 bytes for each sequence.
    """
    generator = torch.Generator()
    generator.manual_seed(sampler.seed + sampler.epoch)
    dtype = torch.int32 if len(numbers) < 2**31 else torch.int64  # the same order
    order = torch.randperm(len(numbers), generator=generator, dtype=dtype)
    drawn: Integers = numbers[order[sampler.rank : sampler.total_size : sampler.num_replicas].numpy()]
    return drawn


def micro_batches(indices: Integers, size: int, first: int, end: int) -> Iterator[list[int]]:
    """Micro-batches number `first` to `end` - 1 of a rank's `indices`, each of `size` sequences.

    A resumed run moves `first`, so no sequence is read and thrown away.
    """
    return (indices[start : start + size].tolist() for start in range(first * size, end * size, size))


def validation_batches(sequences: int, rank: int, world_size: int, size: int) -> list[list[int]]:
    """The batches of validation sequences that `rank` evaluates. Over all ranks, each sequence comes once.

    All ranks get the same number of batches, because each forward may be a collective. Sizes may differ by one, and a
    batch is empty if there are fewer sequences than ranks.
    """
    batches = math.ceil(sequences / (world_size * size)) * world_size
    return [part.tolist() for part in np.array_split(np.arange(sequences), batches)[rank::world_size]]


def collate(sequences: list[Sequence], padded_length: int | None = None) -> dict[str, Tensor]:
    """A batch of sequences of up to T tokens. Shorter ones are padded at the end. Tensors are int64.

    - `input_ids` and `labels` [B, T]. Labels are IGNORE_INDEX at padding and at masked tokens.
    - `indices` [B]: the numbers of the sequences. `tokens` [B]: their lengths without padding.
    - `targets`, a scalar: how many tokens the model has to predict.
    - `cursor` [B, 1 + 4 sources], of a stream only: the number of each sequence in it, and places in the sources.

    Padding needs no attention mask, because causal attention never looks to the right and the labels there are ignored.
    It is masked by length and not by token, because many tokenizers pad with EOS, and EOS must be trained on. An
    empty list gives one padding sequence without targets, so that the rank can still take part in collectives.

    If several documents share a sequence, `padded_length` is T, and two more tensors separate the documents:
    `position_ids`, int64 [B, T], start at 0 in each document. `document_ends`, int32 [D], holds a 0 and then the end of
    each document, or of the padding after it, in the flattened B x T positions.
    """
    lengths = [len(sequence.tokens) for sequence in sequences]
    shape = (max(1, len(sequences)), padded_length or max([2, *lengths]))
    input_ids_BT, labels_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    position_ids_BT, ends = torch.arange(shape[1]).repeat(shape[0], 1), [0]
    for index, (_, tokens, trained_on, segment_lengths, _) in enumerate(sequences):
        input_ids_BT[index, : len(tokens)] = tokens
        labels_BT[index, : len(tokens)] = tokens.where(trained_on, IGNORE_INDEX)
        start = 0
        for length in segment_lengths:
            if start > 0:
                labels_BT[index, start] = IGNORE_INDEX  # the token before it is of another document
            position_ids_BT[index, start : start + length] = torch.arange(length)
            start += length
            ends.append(index * shape[1] + start)
        position_ids_BT[index, start:] -= start
    batch = {
        "input_ids": input_ids_BT,
        "labels": labels_BT,
        "indices": torch.tensor([sequence.number for sequence in sequences], dtype=torch.int64),
        "tokens": torch.tensor(lengths, dtype=torch.int64),
        "targets": (next_tokens(labels_BT) != IGNORE_INDEX).sum(),
    }
    if sequences and sequences[0].cursor:
        batch["cursor"] = torch.tensor([sequence.cursor for sequence in sequences])
    if padded_length:
        sequence_ends = range(shape[1], shape[0] * shape[1] + 1, shape[1])
        batch["position_ids"] = position_ids_BT
        batch["document_ends"] = torch.tensor(sorted({*ends, *sequence_ends}), dtype=torch.int32)
    return batch


def collate_pairs(sequences: list[Sequence], reference: Tensor | None = None) -> dict[str, Tensor]:
    """Pairs as a batch of single sequences [2B, T]: the chosen sequence of each of the B pairs, then the rejected ones.

    The batch has the names of `collate`. `indices` is [B] and `tokens` is [2B]. `targets` is B, because a pair is one
    target. From `reference` [2, R], for all R pairs of the split, it takes `reference` [2B].
    """
    batch = collate([_segment(sequence, side) for side in (0, 1) for sequence in sequences])
    batch["indices"] = batch["indices"][: len(sequences)]
    batch["targets"] = torch.tensor(len(sequences))
    if reference is not None:
        batch["reference"] = reference[:, batch["indices"]].flatten()
    return batch


def _segment(sequence: Sequence, index: int) -> Sequence:
    """Segment number `index` of a sequence, as a sequence."""
    end = sum(sequence.segment_lengths[: index + 1])
    part = slice(end - sequence.segment_lengths[index], end)
    return Sequence(
        sequence.number, sequence.tokens[part], sequence.trained_on[part], [sequence.segment_lengths[index]]
    )


IGNORE_INDEX = -100

"""The label of a position that is no target: padding, or a masked token."""


def next_tokens(labels_BT: Tensor) -> Tensor:
    """The target of position t is label t + 1. The last position of a sequence has none."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
