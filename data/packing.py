"""How the tokens of documents become sequences: arithmetic on lengths, nothing else.

The documents of a split are concatenated. A segment is an interval of these tokens. It belongs to one document, except
with concat, where it may cover several. A sequence is a list of segments.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

SEQUENCES_OF_A_PART = 2**18  # that concat makes at a time, in about 12 MiB


@dataclass(frozen=True)
class Packing:
    """How the tokens of documents become sequences."""

    kind: str  # concat, documents, none or pairs; `pack` says what each is
    block_size: int  # the most tokens of a sequence

    @property
    def padded_length(self) -> int | None:
        """The length to which sequences are padded, if several documents share one."""
        return self.block_size if self.kind == "documents" else None

    def key(self) -> list[object]:
        """Its part of the key of prepared data."""
        return [self.kind, self.block_size]


@dataclass(frozen=True)
class Packed:
    """Sequences as lists of segments. `segments`, int64 [S, 2], holds where each starts and ends, in their order.

    `first_segments`, int64 [sequences + 1], holds the number of the first segment of each sequence, and last S.
    """

    segments: Integers
    first_segments: Integers


def pack(packing: Packing, lengths: Integers) -> Packed:
    """Sequences of at most block_size tokens, from documents of `lengths` tokens, int64 [D].

    - concat cuts the concatenated tokens into full sequences, and drops the last, partial one.
    - none gives each document sequences of its own.
    - documents puts several documents into one sequence.
    - pairs puts two consecutive documents into one sequence. Neither may be longer than block_size, and if one of a
      pair is empty, both are.

    Only concat drops tokens. In none and documents, a document longer than block_size becomes several segments, all but
    the last of them full.
    """
    kind, block_size = packing.kind, packing.block_size
    if kind == "concat":
        starts = np.arange(0, int(lengths.sum()) + 1, block_size, dtype=np.int64)
        return _one_each(np.stack([starts[:-1], starts[1:]], axis=1))
    segments = _cut(lengths, block_size)
    if kind == "pairs":
        return Packed(segments, np.arange(0, len(segments) + 1, 2, dtype=np.int64))
    return _one_each(segments) if kind == "none" else _best_fit(segments, block_size)


def pack_in_parts(packing: Packing, lengths: Integers) -> Iterator[Packed]:
    """The sequences of `pack`, in parts: with concat, memory does not grow with their number.

    Segments are positions in all tokens of `lengths`. `first_segments` counts from the first segment of its part.
    """
    if packing.kind != "concat":
        yield pack(packing, lengths)
        return
    tokens, part = int(lengths.sum()), packing.block_size * SEQUENCES_OF_A_PART
    for start in range(0, tokens, part):
        packed = pack(packing, np.array([min(part, tokens - start)]))
        yield Packed(packed.segments + start, packed.first_segments)


def _one_each(segments: Integers) -> Packed:
    return Packed(segments, np.arange(len(segments) + 1, dtype=np.int64))


def _cut(lengths: Integers, block_size: int) -> Integers:
    """Segments of at most `block_size` tokens. An empty document has none."""
    counts = -(-lengths // block_size)
    document = np.repeat(np.arange(len(lengths)), counts)
    ends = np.cumsum(lengths)
    number_within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (ends - lengths)[document] + number_within * block_size
    return np.stack([starts, np.minimum(starts + block_size, ends[document])], axis=1).astype(np.int64)


def _best_fit(segments: Integers, block_size: int) -> Packed:
    """Put each segment, the longest first, into the sequence where it leaves the least room (best-fit decreasing).

    This is bin packing. It needs at most 11/9 of the smallest possible number of sequences, and 4 more (Johnson 1973).
    """
    lengths = segments[:, 1] - segments[:, 0]
    sequences_with_room: dict[int, list[int]] = defaultdict(list)  # by free positions: the sequences that have so many
    rooms: list[int] = []  # its keys, in order
    sequence_of_segment = np.empty(len(segments), np.int64)
    sequences = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for segment, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            sequence, room, sequences = sequences, block_size, sequences + 1
        else:
            room = rooms[place]
            sequence = sequences_with_room[room].pop()
            if not sequences_with_room[room]:
                del rooms[place]
        sequence_of_segment[segment] = sequence
        if rest := room - length:
            if not sequences_with_room[rest]:
                insort(rooms, rest)
            sequences_with_room[rest].append(sequence)
    order = np.argsort(sequence_of_segment, kind="stable")
    first_segments = np.concatenate([[0], np.cumsum(np.bincount(sequence_of_segment, minlength=sequences))]).astype(
        np.int64
    )
    return Packed(segments[order], first_segments)
