"""Rows of tokens, on disk and memory-mapped: opened at once however many there are. data/prepare.py writes them.

They are flat files of numbers, instead of Arrow: a row is found by arithmetic, and read by slicing.

The prepared tokens of a source are one flat file, `tokens.bin`: uint32, all documents in a line; the highest bit of a
token that is not learned is set. A split of it has two more: `segments.bin` (int64, where each piece of that line starts
and ends) and `sequences.bin` (int64, the first piece of each row, and the number of all pieces).
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tokens import MASKED

Integers = NDArray[np.int64]


class Sequence(NamedTuple):
    """What one row of a batch is made of: at most block_size tokens, T, of one document or of several."""

    number: int  # in its split
    tokens: Tensor  # int64 [T]
    trained_on: Tensor  # bool [T]
    segment_lengths: list[int]  # of the pieces between which there is no attention; their sum is T
    cursor: tuple[int, ...] = ()  # of a row of a stream: where it stands there (data/stream.py)


class PreparedDataset(torch.utils.data.Dataset[Sequence]):
    """The rows of a prepared split, read on demand. `padded_length` is their length, where documents share a row.

    `reference`, fp32 [2, rows], is for whoever trains on pairs to set: the log-probability that a reference model gives
    to what is learned of each chosen (0) and rejected (1) sequence.
    """

    def __init__(self, folder: Path, padded_length: int | None) -> None:
        self.folder, self.padded_length = folder, padded_length
        self.reference: Tensor | None = None
        self.tokens = np.memmap(folder.parent / "tokens.bin", np.uint32, "r")
        self.segments = np.memmap(folder / "segments.bin", np.int64, "r").reshape(-1, 2)
        self.first_segments = np.memmap(folder / "sequences.bin", np.int64, "r")
        self.sources = [(len(self), len(self))]  # the rows there are, and the rows of an epoch

    def __len__(self) -> int:
        return len(self.first_segments) - 1

    def __getitem__(self, index: int) -> Sequence:
        pieces = self.segments[self.first_segments[index] : self.first_segments[index + 1]]
        tokens = torch.from_numpy(np.concatenate([self.tokens[start:end] for start, end in pieces]).astype(np.int64))
        return Sequence(index, tokens & ~MASKED, tokens < MASKED, (pieces[:, 1] - pieces[:, 0]).tolist())

    def epoch_indices(self, epoch: int, seed: int) -> Integers:
        """The numbers of the rows of an epoch, for a sampler to shuffle: int64 [len(self)]. All, whichever epoch."""
        return np.arange(len(self))

    def __reduce__(self) -> tuple[type, tuple[Path, int | None]]:
        return PreparedDataset, (self.folder, self.padded_length)  # to a worker process travels the path, not the file


class Mixture(torch.utils.data.Dataset[Sequence]):
    """The rows of several sources, numbered one source after the other, of which epochs take shares by weight.

    An epoch has as many rows as all sources together. Each source gives its share of them out of passes of its own
    over its rows, each in another order, and the next epoch goes on where this one ended: a row comes again only
    after all others of its source. Without weights, every epoch is every row once.
    """

    def __init__(self, parts: list[PreparedDataset], weights: list[float] | None = None) -> None:
        self.parts, self.padded_length = parts, parts[0].padded_length
        self.reference: Tensor | None = None
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        shares = np.cumsum(weights or [len(part) for part in parts])
        # Of each source, the rows there are, and its rows of an epoch: whole rows that add up to all.
        quotas = np.diff(np.rint(shares / shares[-1] * len(self)).astype(np.int64), prepend=0).tolist()
        self.sources = [(len(part), quota) for part, quota in zip(parts, quotas, strict=True)]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Sequence:
        part = bisect_right(self.ends, number)
        first = self.ends[part] - len(self.parts[part])
        return self.parts[part][number - first]._replace(number=number)

    def epoch_indices(self, epoch: int, seed: int) -> Integers:
        """The same as of `Rows`: a function of (seed, epoch), some numbers more than once and others not at all."""
        numbers = []
        for source, (rows, quota) in enumerate(self.sources):
            first = epoch * quota  # rows that earlier epochs have drawn
            passes = range(first // rows, -(-(first + quota) // rows))
            order = [np.random.default_rng([seed, source, number]).permutation(rows) for number in passes]
            drawn = np.concatenate([np.zeros(0, np.int64), *order])[first - passes.start * rows :][:quota]
            numbers.append(drawn + self.ends[source] - rows)
        return np.concatenate(numbers)


@dataclass(frozen=True)
class Split:
    """What was counted while a split was prepared."""

    shape: str  # of its records: text, or one of data.chat.SHAPES
    rows: int
    tokens: int
    trained_tokens: int
    dropped_tokens: int  # of its last, partial row
    documents: int  # texts or conversations that are learned from; a pair is two
    cut_documents: int  # those of them that were longer than a row, and lost what was beyond
    empty_documents: int  # left out: they had no text
    targetless_documents: int  # left out: no token of them would have been learned

    def filled(self, row_tokens: int) -> float:
        """The share of the slots of all rows, each of `row_tokens`, that hold a token."""
        return (self.tokens - self.dropped_tokens) / (self.rows * row_tokens)


def total(splits: list[Split]) -> Split:
    """What was counted of several sources."""
    numbers = [name for name in Split.__annotations__ if name != "shape"]
    counts = {name: sum(getattr(split, name) for split in splits) for name in numbers}
    return Split(", ".join(sorted({split.shape for split in splits})), **counts)
