"""Rows of tokens, on disk and memory-mapped: opened at once however many there are. data/prepare.py writes them.

They are flat files of numbers, in the place of Arrow: a row is found by arithmetic, and read by slicing.

The prepared tokens of a source are one flat file, `tokens.bin`: uint32, all documents in a line; the highest bit of a
token that is not learned is set. A split of it has two more: `pieces.bin` (int64, where each piece of that line starts
and ends) and `rows.bin` (int64, the first piece of each row, and the number of all pieces).
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.tokens import MASKED

if TYPE_CHECKING:
    from data.stream import StreamingDataset

Integers = NDArray[np.int64]


class Sequence(NamedTuple):
    """What one row of a batch is made of: at most block_size tokens, T, of one document or of several."""

    number: int  # in its split
    tokens: Tensor  # int64 [T]
    learned: Tensor  # bool [T]
    lengths: list[int]  # of the pieces between which there is no attention; their sum is T
    cursor: tuple[int, ...] = ()  # of a row of a stream: where it stands there (data/stream.py)


class PreparedDataset(torch.utils.data.Dataset[Sequence]):
    """The rows of a prepared split, read on demand. `documents_of` is their length, where documents share a row.

    `reference`, fp32 [2, rows], is for whoever trains on pairs to set: the log-probability that a reference model gives
    to what is learned of each chosen (0) and rejected (1) sequence.
    """

    def __init__(self, folder: Path, documents_of: int | None) -> None:
        self.folder, self.documents_of = folder, documents_of
        self.reference: Tensor | None = None
        self.tokens = np.memmap(folder.parent / "tokens.bin", np.uint32, "r")
        self.pieces = np.memmap(folder / "pieces.bin", np.int64, "r").reshape(-1, 2)
        self.first_pieces = np.memmap(folder / "rows.bin", np.int64, "r")
        self.sources = [(len(self), len(self))]  # the rows there are, and the rows of an epoch

    def __len__(self) -> int:
        return len(self.first_pieces) - 1

    def __getitem__(self, index: int) -> Sequence:
        pieces = self.pieces[self.first_pieces[index] : self.first_pieces[index + 1]]
        tokens = torch.from_numpy(np.concatenate([self.tokens[start:end] for start, end in pieces]).astype(np.int64))
        return Sequence(index, tokens & ~MASKED, tokens < MASKED, (pieces[:, 1] - pieces[:, 0]).tolist())

    def of_epoch(self, epoch: int, seed: int) -> Integers:
        """The numbers of the rows of an epoch, for a sampler to shuffle: int64 [len(self)]. All, whichever epoch."""
        return np.arange(len(self))

    def __reduce__(self) -> tuple[type, tuple[Path, int | None]]:
        return PreparedDataset, (self.folder, self.documents_of)  # to a worker process travels the path, not the file


class Mixture(torch.utils.data.Dataset[Sequence]):
    """The rows of several sources, numbered one source after the other, of which epochs take shares by weight.

    An epoch has as many rows as all sources together. Each source gives its share of them out of passes of its own
    over its rows, each in another order, and the next epoch goes on where this one ended: a row comes again only
    after all others of its source. Without weights, every epoch is every row once.
    """

    def __init__(self, parts: list[PreparedDataset], weights: list[float] | None = None) -> None:
        self.parts, self.documents_of = parts, parts[0].documents_of
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

    def of_epoch(self, epoch: int, seed: int) -> Integers:
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
    learned_tokens: int
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


@dataclass(frozen=True)
class Data:
    """Training and validation rows, with their counts and a fingerprint (SHA-256) of all their tokens."""

    source: str
    tokenizer: str
    fingerprint: str
    packing: str
    stop_tokens: list[int]  # the special tokens with which documents end, as far as they are learned; at most two
    train: "PreparedDataset | Mixture | StreamingDataset"
    validation: PreparedDataset | Mixture | None
    counts: dict[str, Split]


def tokens_per_sequence(data: Data, block_size: int) -> int:
    """The slots of a row: a pair has two sequences."""
    return block_size * (2 if data.packing == "pairs" else 1)


def describe_data(data: Data, block_size: int) -> dict[str, str]:
    """What was prepared, for the start block and for data/prepare.py."""
    held_out = data.counts.get("validation")
    validation = f"{held_out.documents:,} documents, {held_out.rows:,} rows" if held_out else "none"
    if "train" not in data.counts:
        rows = f"of up to {block_size} tokens, packing {data.packing}"
        return {"tokenizer": data.tokenizer, "data": data.source, "rows": rows, "validation": validation}
    train, slots = data.counts["train"], tokens_per_sequence(data, block_size)
    lines = {
        "tokenizer": data.tokenizer,
        "data": f"{data.source}: {train.documents:,} documents ({train.shape}), {train.tokens:,} tokens, "
        f"{train.learned_tokens / train.tokens:.1%} of them learned",
        "left out": f"{train.empty_documents} empty documents, {train.targetless_documents} with nothing to learn, "
        f"what {train.cut_documents} documents had beyond a row, {train.dropped_tokens} tokens of a last partial row",
        "rows": f"{train.rows:,} of {slots} tokens, packing {data.packing}, "
        f"{train.filled(slots):.2%} of their slots used",
        "validation": validation,
    }
    if len(data.train.sources) > 1:
        drawn = [f"{quota:,} from {rows:,} rows" for rows, quota in data.train.sources]
        lines["mixture"] = f"an epoch draws {', '.join(drawn)}"
    return lines


GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"  # green, grey


def show_examples(
    rows: PreparedDataset | Mixture | StreamingDataset, number: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The first rows as text: learned tokens in green, given ones in grey, and a line between rows and documents."""
    lines = []
    for row in islice(iter(rows), number):
        lines.append(f"--- row {row.number}: {len(row.tokens)} tokens, {int(row.learned.sum())} of them learned ---")
        start = 0
        for length in row.lengths:
            piece = zip(
                row.tokens[start : start + length].tolist(), row.learned[start : start + length].tolist(), strict=True
            )
            runs = [(learned, [token for token, _ in run]) for learned, run in groupby(piece, key=lambda pair: pair[1])]
            lines.append("".join((GREEN if learned else GRAY) + tokenizer.decode(ids) + PLAIN for learned, ids in runs))
            start += length
    return "\n".join([*lines, f"--- {GREEN}learned{PLAIN}, {GRAY}given{PLAIN} ---"])
