"""Prepared sequences: files of numbers, which data/cache.py writes, and which are verified when they are read.

A source has all its tokens in `tokens.bin`: uint32, with the highest bit set where a token is masked. Each split of it
has two more files of int64. `segments.bin` holds the start and end of each segment in tokens.bin. `sequences.bin` holds
the number of the first segment of each sequence, and last the number of all segments.

The files are not Arrow: a sequence is found by arithmetic, and opening takes no time, however many there are.
about.json says what was written to each of them (data/files/checked.py).
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from config.errors import OptionError
from data.files.checked import CheckedArray, Content, DamagedError, read_checked
from data.tokens import MASKED

Integers = NDArray[np.signedinteger]


class Sequence(NamedTuple):
    """A training example of T tokens, at most block_size, from one document or from several."""

    number: int  # its index in the split
    tokens: Tensor  # int64 [T]
    trained_on: Tensor  # bool [T]
    segment_lengths: list[int]  # tokens of each segment; no attention between segments; their sum is T
    cursor: tuple[int, ...] = ()  # of a stream: the position of the sequence in it (data/stream.py)


class PreparedDataset(torch.utils.data.Dataset[Sequence]):
    """The sequences of a prepared split, read on demand.

    `padded_length` is the length to which batches are padded, if several documents share a sequence; else None.
    `reference`, fp32 [2, sequences], is set for training on pairs: the log-probability that the reference model gives
    to the tokens trained on, of each chosen (0) and rejected (1) sequence.
    """

    def __init__(self, folder: Path, padded_length: int | None) -> None:
        self.folder, self.padded_length = folder, padded_length
        self.reference: Tensor | None = None
        self.tokens, self.segments, self.first_segments = open_prepared(folder.parent, folder.name)
        self.sources = [(len(self), len(self))]  # of each source: its sequences, and how many of them an epoch draws

    def __len__(self) -> int:
        return len(self.first_segments) - 1

    def __getitem__(self, index: int) -> Sequence:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            first, end = self.first_segments[index : index + 2]
            segments = self.segments[first:end]
            parts = [self.tokens[start:end] for start, end in segments]
        except DamagedError as error:
            raise OptionError(
                f"{error}\na disk, a copy or a program changed prepared data, so the run ends before it trains on it\n"
                f"remove {self.folder.parent}; the next start prepares it again and may resume"
            ) from error
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return Sequence(index, tokens & ~MASKED, tokens < MASKED, (segments[:, 1] - segments[:, 0]).tolist())

    def epoch_indices(self, epoch: int, seed: int) -> Integers:
        """The numbers of the sequences of an epoch, for a sampler to shuffle: [len(self)]. Always all of them."""
        return np.arange(len(self), dtype=np.int32 if len(self) < 2**31 else np.int64)

    def __reduce__(self) -> tuple[type, tuple[Path, int | None]]:
        return PreparedDataset, (self.folder, self.padded_length)  # a worker process gets the path, not the content


def open_prepared(folder: Path, split: str) -> tuple[CheckedArray, CheckedArray, CheckedArray]:
    """The tokens of a prepared source, and the segments [S, 2] and first segments of one of its splits.

    Raises DamagedError if a file is missing, or has another size than about.json says.
    """
    written = read_checked(folder / "about.json")["files"]

    def array(name: str, dtype: type, shape: tuple[int, ...] = ()) -> CheckedArray:
        return CheckedArray(folder / name, dtype, Content(**written[name]), shape)

    segments, sequences = array(f"{split}/segments.bin", np.int64, (2,)), array(f"{split}/sequences.bin", np.int64)
    return array("tokens.bin", np.uint32), segments, sequences


class Mixture(torch.utils.data.Dataset[Sequence]):
    """The sequences of several sources, of which each epoch draws by weight. Sources are numbered one after the other.

    An epoch has as many sequences as all sources together. A source contributes its fraction of them from passes over
    its own sequences. Each pass has another order, and the next epoch continues where this one ended. So a sequence
    comes again only after all others of its source. Without weights, an epoch has every sequence once.
    """

    def __init__(self, parts: list[PreparedDataset], weights: list[float] | None = None) -> None:
        self.parts, self.padded_length = parts, parts[0].padded_length
        self.reference: Tensor | None = None
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        bounds = np.cumsum(weights or [len(part) for part in parts])
        # How many sequences an epoch draws from each source: integers whose sum is the length of the mixture.
        quotas = np.diff(np.rint(bounds / bounds[-1] * len(self)).astype(np.int64), prepend=0).tolist()
        self.sources = [(len(part), quota) for part, quota in zip(parts, quotas, strict=True)]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Sequence:
        part = bisect_right(self.ends, number)
        first = self.ends[part] - len(self.parts[part])
        return self.parts[part][number - first]._replace(number=number)

    def epoch_indices(self, epoch: int, seed: int) -> Integers:
        """The numbers of the sequences of an epoch, for a sampler to shuffle: int64 [len(self)].

        They are a function of (seed, epoch). Some numbers come more than once, and others not at all.
        """
        numbers = []
        for source, (sequences, quota) in enumerate(self.sources):
            first = epoch * quota  # sequences that earlier epochs have drawn
            passes = range(first // sequences, -(-(first + quota) // sequences))
            order = [np.random.default_rng([seed, source, number]).permutation(sequences) for number in passes]
            drawn = np.concatenate([np.zeros(0, np.int64), *order])[first - passes.start * sequences :][:quota]
            numbers.append(drawn + self.ends[source] - sequences)
        return np.concatenate(numbers)


@dataclass(frozen=True)
class Split:
    """Counts of a split, made during its preparation."""

    shape: str  # of its records: text, or one of chat.shapes.SHAPES
    sequences: int
    tokens: int
    trained_tokens: int
    dropped_tokens: int  # of its last, partial sequence
    documents: int  # texts or conversations that are trained on; a pair is two
    cut_documents: int  # those of them that were longer than a sequence, and are truncated
    empty_documents: int  # left out, because they have no text
    targetless_documents: int  # left out, because no token would be trained on
    had_bos: int  # texts that already begin with BOS, which is not added again
    had_eos: int  # texts that already end with EOS, which is not added again

    def filled(self, sequence_tokens: int) -> float:
        """The fraction of the positions of all sequences, each of `sequence_tokens`, that hold a token."""
        return (self.tokens - self.dropped_tokens) / (self.sequences * sequence_tokens)


def total(splits: list[Split]) -> Split:
    """The sum of the counts of several sources."""
    numbers = [name for name in Split.__annotations__ if name != "shape"]
    counts = {name: sum(getattr(split, name) for split in splits) for name in numbers}
    return Split(", ".join(sorted({split.shape for split in splits})), **counts)
