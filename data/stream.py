"""Rows of a data set that is never prepared, because it does not fit on a disk: made while they are learned from.

What order means here. The text is read file by file; each pass over it has another order of files, which depends on
the seed, and within a file the order is the file's own: rows are not shuffled. The text is cut into chunks of about 64
KiB, which are dealt to as many lanes as a global batch has rows: chunk c belongs to lane c modulo that number. Every
global batch has one row of each lane, so that its rows come from places far apart. A chunk is packed by itself, and its
last row is as short as it comes: no token is left out, and none comes twice in a pass. (A large .txt file is cut where
a chunk ends.) Lanes go on with the next pass when one ends, each in its turn; a stream has no epochs. Records without
text, or with nothing to learn, are passed over and not counted.

A global batch is so a function of (seed, step, global batch size) alone: rank r of N has the lanes r, r + N, and so on.
Each rank reads all of the text, which is cheap, and tokenizes the chunks of its own lanes, in one process.

A cursor says of each lane what its last row was: (pass, file, byte, record) where its chunk begins, the number of the
chunk, and that of the row in it. From there a stream goes on, on any number of ranks: it reads from the first chunk
that a lane is in, and makes the rows of that chunk again.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from config.errors import OptionError
from data.packing import Packing, pack
from data.records import START, Position, Raw, chunks, read
from data.sequences import Sequence
from data.sources import Source
from data.tokens import MASKED, Encoded, Rendering, document_lengths, encoder

CHUNK = 1 << 16  # bytes; what a lane holds of the text, and what a resumed one tokenizes again

BARREN = 1000  # chunks in a row without a row, after which a stream is given up

ENDLESS = 1 << 62  # rows

Cursor = list[list[int]]


@dataclass
class StreamingDataset(torch.utils.data.IterableDataset[Sequence]):
    """The rows that a rank learns from, without end. `share` gives a rank its own."""

    source: Source
    rendering: Rendering
    packing: Packing
    seed: int
    lanes: range = range(1)
    global_batch_size: int = 1
    cursor: Cursor = field(default_factory=list)
    reference: None = None  # pairs are not streamed

    def __len__(self) -> int:
        return ENDLESS

    @property
    def sources(self) -> list[tuple[int, int]]:
        """As of `Rows`: an epoch that never ends."""
        return [(ENDLESS, ENDLESS)]

    @property
    def padded_length(self) -> int | None:
        return self.packing.padded_length

    def shard(self, rank: int, world_size: int, global_batch_size: int, cursor: Cursor) -> "StreamingDataset":
        """The rows of one rank, after those that `cursor` says."""
        lanes = range(rank, global_batch_size, world_size)
        return replace(self, lanes=lanes, global_batch_size=global_batch_size, cursor=cursor)

    def __iter__(self) -> Iterator[Sequence]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a loader's process is forked, and may have no threads of it
        encode = encoder(self.rendering)
        last = {cursor[4] % self.global_batch_size: cursor for cursor in self.cursor}
        # Without a cursor, a lane is before the first row of its first chunk.
        mine = {lane: last.get(lane, [0, *START, lane, -1]) for lane in self.lanes}
        first = min(mine.values(), key=lambda cursor: cursor[4]) if last else [0, *START, 0, -1]
        dealt = self._chunks(number=first[4], epoch=first[0], position=(first[1], first[2], first[3]))
        waiting: dict[int, deque[tuple[int, list[int], list[Raw]]]] = {lane: deque() for lane in self.lanes}

        def rows_of(lane: int) -> Iterator[Sequence]:
            barren = 0
            while barren < BARREN:
                while not waiting[lane]:
                    number, place, records = next(dealt)
                    owner = number % self.global_batch_size
                    if owner in waiting and number >= mine[owner][4]:
                        waiting[owner].append((number, place, records))
                number, place, records = waiting[lane].popleft()
                rows = self._rows(encode(records))
                barren = 0 if rows else barren + 1
                for index, row in enumerate(rows):
                    if [number, index] > mine[lane][4:]:
                        yield row._replace(number=number << 20 | index, cursor=(*place, number, index))
            raise OptionError(f"{self.source.name}: no row in {barren} chunks of {CHUNK} bytes; pass other text")

        turns = [rows_of(lane) for lane in self.lanes]
        while True:
            for turn in turns:
                yield next(turn)

    def _chunks(self, number: int, epoch: int, position: Position) -> Iterator[tuple[int, list[int], list[Raw]]]:
        """Chunks from `number` on, which begins at `position` of a pass, each with the place where it begins."""
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source.files))
            source = replace(self.source, files=tuple(self.source.files[index] for index in order))
            for records in chunks(read(source, position), CHUNK):
                yield number, [epoch, *position], records
                number, position = number + 1, records[-1].after
            epoch, position = epoch + 1, START

    def _rows(self, encoded: Encoded) -> list[Sequence]:
        """The rows of one chunk, as yet without their numbers."""
        tokens = torch.tensor([token for row, _ in encoded for token in row], dtype=torch.int64)
        lengths = document_lengths([len(row) for row, _ in encoded], [fate for _, fate in encoded])
        if self.packing.kind == "concat":  # as one document, whose last row may be short
            packed = pack(replace(self.packing, kind="none"), lengths.sum(keepdims=True))
        else:
            packed = pack(self.packing, lengths)
        rows = []
        for first, end in zip(packed.first_segments[:-1], packed.first_segments[1:], strict=True):
            pieces = packed.segments[first:end]
            row = torch.cat([tokens[start:stop] for start, stop in pieces])
            rows.append(Sequence(0, row & ~MASKED, row < MASKED, (pieces[:, 1] - pieces[:, 0]).tolist()))
        return rows
