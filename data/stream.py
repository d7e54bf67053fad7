"""A stream: sequences that are made during training, for data too large to prepare.

Order. Each pass reads the files in another order, which depends on the seed. Within a file, the order is unchanged:
sequences are not shuffled. The text is cut into chunks of about 64 KiB. Chunk c belongs to lane c % global_batch_size.
Each step takes one sequence from each lane, so the sequences of a global batch come from distant places. Each chunk is
packed by itself, and its last sequence may be short. No token is left out, and none comes twice in a pass. A large .txt
file is cut where a chunk ends. At the end of a pass, each lane continues with the next pass, so a stream has no epochs.
Records without text or without a token to train on are skipped and not counted.

Ranks. A global batch is a function of (seed, step, global batch size) alone. Rank r of N has the lanes r, r + N, and so
on. Each rank reads all of the text, which is cheap, and tokenizes only the chunks of its lanes, in one process.

Cursor. For each lane, it says what its last sequence was: (pass, file, byte, record) where the chunk begins, the number
of the chunk, and the number of the sequence in it. A stream resumes from a cursor on any number of ranks. It reads from
the first chunk that a lane is in, and makes the sequences of that chunk again.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from config.errors import OptionError
from data.packing import Packing, pack
from data.records import START, Position, RawRecord, chunks, read
from data.sequences import Sequence
from data.sources import Source
from data.tokens import MASKED, Encoded, Rendering, document_lengths, encoder

LANE_CHUNK = 1 << 16  # bytes of text that a lane holds, and that it tokenizes again after a resume

MAX_EMPTY_CHUNKS = 1000  # consecutive chunks without a sequence, after which the stream is refused

ENDLESS = 1 << 62  # the number of sequences of a stream

Cursor = list[list[int]]


@dataclass
class StreamingDataset(torch.utils.data.IterableDataset[Sequence]):
    """The sequences that a rank trains on, without end. `shard` gives each rank its lanes."""

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
        """The number of sequences, and how many of them an epoch draws. A stream is one epoch that never ends."""
        return [(ENDLESS, ENDLESS)]

    @property
    def padded_length(self) -> int | None:
        return self.packing.padded_length

    def shard(self, rank: int, world_size: int, global_batch_size: int, cursor: Cursor) -> "StreamingDataset":
        """The sequences of one rank, after those of `cursor`. An empty cursor is the start of the stream."""
        lanes = range(rank, global_batch_size, world_size)
        return replace(self, lanes=lanes, global_batch_size=global_batch_size, cursor=cursor)

    def __iter__(self) -> Iterator[Sequence]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the fork of a loader
        encode = encoder(self.rendering)
        last = {cursor[4] % self.global_batch_size: cursor for cursor in self.cursor}
        # Without a cursor, a lane is before the first sequence of its first chunk.
        cursors = {lane: last.get(lane, [0, *START, lane, -1]) for lane in self.lanes}
        first = min(cursors.values(), key=lambda cursor: cursor[4]) if last else [0, *START, 0, -1]
        all_chunks = self._chunks(number=first[4], epoch=first[0], position=(first[1], first[2], first[3]))
        waiting: dict[int, deque[tuple[int, list[int], list[RawRecord]]]] = {lane: deque() for lane in self.lanes}

        def sequences_of(lane: int) -> Iterator[Sequence]:
            empty_chunks = 0
            while empty_chunks < MAX_EMPTY_CHUNKS:
                while not waiting[lane]:
                    number, place, records = next(all_chunks)
                    owner = number % self.global_batch_size
                    if owner in waiting and number >= cursors[owner][4]:
                        waiting[owner].append((number, place, records))
                number, place, records = waiting[lane].popleft()
                sequences = self._sequences(encode(records))
                empty_chunks = 0 if sequences else empty_chunks + 1
                for index, sequence in enumerate(sequences):
                    if [number, index] > cursors[lane][4:]:
                        yield sequence._replace(number=number << 20 | index, cursor=(*place, number, index))
            raise OptionError(
                f"{self.source.name}: no sequence in {empty_chunks} chunks of {LANE_CHUNK} bytes; pass other text"
            )

        lane_iterators = [sequences_of(lane) for lane in self.lanes]
        while True:
            for iterator in lane_iterators:
                yield next(iterator)

    def _chunks(self, number: int, epoch: int, position: Position) -> Iterator[tuple[int, list[int], list[RawRecord]]]:
        """Chunks from `number` on, which begins at `position` of a pass, each with the place where it begins."""
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source.files))
            source = replace(self.source, files=tuple(self.source.files[index] for index in order))
            for records in chunks(read(source, position), LANE_CHUNK):
                yield number, [epoch, *position], records
                number, position = number + 1, records[-1].after
            epoch, position = epoch + 1, START

    def _sequences(self, encoded: Encoded) -> list[Sequence]:
        """The sequences of one chunk, without their numbers."""
        tokens = torch.tensor([token for one in encoded for token in one.tokens], dtype=torch.int64)
        lengths = document_lengths([len(one.tokens) for one in encoded], [one.outcome for one in encoded])
        if self.packing.kind == "concat":  # as one document, because its last sequence may be short
            packed = pack(replace(self.packing, kind="none"), lengths.sum(keepdims=True))
        else:
            packed = pack(self.packing, lengths)
        sequences = []
        for first, end in zip(packed.first_segments[:-1], packed.first_segments[1:], strict=True):
            segments = packed.segments[first:end]
            sequence = torch.cat([tokens[start:stop] for start, stop in segments])
            sequences.append(
                Sequence(0, sequence & ~MASKED, sequence < MASKED, (segments[:, 1] - segments[:, 0]).tolist())
            )
        return sequences
