"""How the tokens of documents become rows: arithmetic on lengths, nothing else.

All tokens of a split stand in one line, document after document. A segment is a stretch of that line, of one document
(or, under concat, of several), and a row is a list of segments that are trained together.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ROWS_OF_A_PART = 2**18  # of concat, at a time: some 12 MiB


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
    """Rows of at most `block_size` tokens, out of documents of `lengths` tokens, int64 [D], in one of four ways.

    concat cuts the line into full rows, and leaves out the last, partial one. none gives each document rows of its
    own, and documents puts several into one row. Neither loses a token: a document that is longer than a row is cut
    into segments, and only the last one of them is shorter. pairs puts two documents that follow each other into one
    row; none of them may be longer than block_size, and both of a pair are empty or none.
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
    """The same rows in parts, so that memory does not grow with them where they follow one from another: concat.

    The segments of a part are where they are in the whole line; its `first_segments` count from its own first.
    """
    if packing.kind != "concat":
        yield pack(packing, lengths)
        return
    tokens, part = int(lengths.sum()), packing.block_size * ROWS_OF_A_PART
    for start in range(0, tokens, part):
        packed = pack(packing, np.array([min(part, tokens - start)]))
        yield Packed(packed.segments + start, packed.first_segments)


def _one_each(segments: Integers) -> Packed:
    return Packed(segments, np.arange(len(segments) + 1, dtype=np.int64))


def _cut(lengths: Integers, block_size: int) -> Integers:
    """Segments of at most `block_size` tokens; an empty document has none."""
    counts = -(-lengths // block_size)
    document = np.repeat(np.arange(len(lengths)), counts)
    ends = np.cumsum(lengths)
    number_within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (ends - lengths)[document] + number_within * block_size
    return np.stack([starts, np.minimum(starts + block_size, ends[document])], axis=1).astype(np.int64)


def _best_fit(segments: Integers, block_size: int) -> Packed:
    """Each segment, the longest first, into the row where it leaves the least room (best-fit decreasing).

    This is bin packing: never more than 11/9 of the least possible number of rows and 4 more (Johnson 1973), and on
    ragged documents close to it.
    """
    lengths = segments[:, 1] - segments[:, 0]
    rows_with_room: dict[int, list[int]] = defaultdict(list)  # free slots: the rows that have so many
    rooms: list[int] = []  # its keys, in order
    row_of_piece = np.empty(len(segments), np.int64)
    rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for segment, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room, rows = rows, block_size, rows + 1
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[place]
        row_of_piece[segment] = row
        if rest := room - length:
            if not rows_with_room[rest]:
                insort(rooms, rest)
            rows_with_room[rest].append(row)
    order = np.argsort(row_of_piece, kind="stable")
    first_segments = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece, minlength=rows))]).astype(np.int64)
    return Packed(segments[order], first_segments)
