"""A stream: sequences that are made during training, for data too large to prepare.

Order. The text is cut into parts of about 1 MiB. Their limits follow from the sizes of the files, so nothing is read to
know them (data/records.py says which records a part has). In each pass over a source, its parts come in another order,
drawn from (seed, pass) for all parts at once. A global batch has as many lanes as sequences. Part n of all passes
belongs to lane n % global_batch_size, and each step takes one sequence from each lane. So the sequences of a global
batch come from places that are drawn anew for each part, and a part is read in its own order, by one request. 16 bytes
for each part hold the order: 15 MiB for a terabyte, drawn in 0.05 s.

A lane tokenizes about 64 KiB of its part at a time. Each such chunk is packed by itself, and its last sequence may be
short. No token is left out, and none comes twice in a pass. At the end of a pass, each lane continues with the next
pass, so a stream has no epochs. Records without text or without a token to train on are skipped and not counted.

Files that cannot be cut (compressed files, arrays, tables of text) are one part each. Several lanes share a large one:
lane k of n has its chunks k, k + n, and so on. A rank reads it once for all its lanes that begin it together.

Several sources. Step and seed say from which source each lane takes its sequence. Each source has a pass of its own,
and a place in it for each lane.

Ranks. A global batch is a function of (seed, step, global batch size) alone. Rank r of N has the lanes r, r + N, and so
on, and reads only their parts.

Cursor. For each lane it has the number of its last sequence in the whole stream, and its place in each source: the part
n, the chunk in it, the sequences before this chunk in the part, and the sequences taken from it. A stream resumes from
a cursor on any number of ranks. A lane reads its part again up to the chunk, and makes the sequences of that chunk.
"""

import copy
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from config.errors import OptionError
from data.files.bounded import COMPRESSIONS
from data.packing import Packing, pack
from data.records import Part, RawRecord, Source, can_cut, chunks, file_format, is_table, read_part, size_of_file
from data.sequences import Integers, Sequence
from data.tokens import MASKED, Encoded, Rendering, document_lengths, encoder

LANE_CHUNK = 1 << 16  # bytes of text that a lane tokenizes at a time, and again after a resume

PART = 1 << 20  # bytes of text that are read at a time; a request to a server costs as much as some 100 KiB
ROWS_PART = 1 << 27  # the same for .parquet, whose row groups are large and cost as much to open

PARTS_OF_A_LANE = 16  # in a pass, at least, so that lanes end a pass of a small text at about the same time
SHARES_OF_A_LANE = 4  # the same for files that cannot be cut

COMPRESSED = 4  # bytes of text in a byte of a compressed file, about

SHARED_CHUNKS = 1 << 10  # that a rank holds of a file for lanes that begin it later; after that, they read it again

MAX_EMPTY_CHUNKS = 10_000  # consecutive chunks and parts without a sequence, after which the stream is refused

GOLDEN = (5**0.5 - 1) / 2  # the fractions of its multiples are spread more evenly than random numbers

ENDLESS = 1 << 62  # the number of sequences of a stream

Cursor = list[list[int]]

Place = tuple[int, ...]  # of a lane in a source: part, chunk, sequences before the chunk, and taken from it


@dataclass(frozen=True)
class Text:
    """A source that is streamed, and its fraction of the sequences."""

    source: Source
    rendering: Rendering
    weight: float = 1.0


@dataclass
class StreamingDataset(torch.utils.data.IterableDataset[Sequence]):
    """The sequences that a rank trains on, without end. `shard` gives each rank its lanes."""

    texts: list[Text]
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
        """The sequences of one rank, after those of `cursor`. An empty cursor is the start of the stream.

        Raises OptionError for the cursor of an earlier version, whose lanes had other places.
        """
        if any(len(row) != 1 + 4 * len(self.texts) for row in cursor):
            raise OptionError(
                "resume_from_checkpoint: an earlier version wrote this checkpoint, and read the stream in another order"
                "\nresume it with that version, or pass the exported model as --model_name_or_path of a new run"
            )
        lanes = range(rank, global_batch_size, world_size)
        return replace(self, lanes=lanes, global_batch_size=global_batch_size, cursor=cursor)

    def __iter__(self) -> Iterator[Sequence]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the fork of a loader
        lanes, done = self.global_batch_size, 0
        places: dict[int, list[Place]] = {lane: [(lane, 0, 0, 0)] * len(self.texts) for lane in self.lanes}
        for number, *row in self.cursor:
            done, lane = number // lanes + 1, number % lanes
            if lane in places:
                places[lane] = [tuple(row[at : at + 4]) for at in range(0, len(row), 4)]
        readers = [TextReader(text, self.packing, (self.seed, index), lanes) for index, text in enumerate(self.texts)]
        iterators = {
            lane: [reader.sequences(place) for reader, place in zip(readers, places[lane], strict=True)]
            for lane in self.lanes
        }
        for step in itertools.count(done):
            drawn = self.drawn(step)
            for lane in self.lanes:
                source = drawn[lane]
                sequence = next(iterators[lane][source])
                places[lane][source] = sequence.cursor
                cursor = (step * lanes + lane, *itertools.chain(*places[lane]))
                number = (sequence.number * len(self.texts) + source) % ENDLESS
                yield sequence._replace(number=number, cursor=cursor)

    def drawn(self, step: int) -> list[int]:
        """The source of each lane in a step. The steps up to any one have the weights, but for a few sequences."""
        bounds = np.cumsum([text.weight for text in self.texts])
        numbers = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        drawn = np.searchsorted(bounds[:-1] / bounds[-1], numbers * GOLDEN % 1, side="right")
        # In another order in each step, so that each lane has all sources.
        return [int(source) for source in np.random.default_rng([self.seed, step]).permutation(drawn)]


class TextReader:
    """Reads one source of a stream for the lanes of a rank."""

    def __init__(self, text: Text, packing: Packing, seed: tuple[int, ...], lanes: int) -> None:
        self.source, self.packing, self.seed, self.lanes = text.source, packing, seed, lanes
        self.encode = encoder(text.rendering)
        self.parts, self.shares = cut(text.source, lanes)
        self.ends = np.cumsum(self.parts)  # of the files, in parts
        self.order = lru_cache(4)(self._order)  # lanes may be in two passes, and of a small text in more
        self.shared: dict[tuple[int, int], Iterator[list[RawRecord]]] = {}

    def sequences(self, place: Place) -> Iterator[Sequence]:
        """The sequences of a lane after `place`. The cursor of each is the place after it. Raises OptionError."""
        part, chunk, before, taken = place
        empty = 0
        while empty < MAX_EMPTY_CHUNKS:
            empty += 1
            try:
                for number, records in enumerate(self._chunks(part)):
                    if number < chunk:
                        continue
                    sequences = self._sequences(self.encode(records))
                    empty = 0 if sequences else empty + 1
                    for index, sequence in enumerate(sequences[taken:], taken + 1):
                        place = (part, number, before, index)
                        yield sequence._replace(number=part << 26 | before + index - 1, cursor=place)
                    before, taken = before + len(sequences), 0
            except OptionError:
                for records in self._read(self.locate(part)[1], numbered=True):
                    self.encode(records)  # raises it again, with the line instead of the byte
                raise
            part, chunk, before, taken = part + self.lanes, 0, 0, 0
        raise OptionError(f"{self.source.name}: no sequence in {empty:,} chunks of {LANE_CHUNK} bytes; pass other text")

    def locate(self, number: int) -> tuple[int, Part, int, int]:
        """The pass and the part that `number` is, and which of how many lanes that share the part has it."""
        passed, index = divmod(number, int(self.parts @ self.shares))
        order, ends = self.order(passed)
        at = int(np.searchsorted(ends, index, side="right"))
        file = int(np.searchsorted(self.ends, order[at], side="right"))
        parts, shares = int(self.parts[file]), int(self.shares[file])
        part = Part(file, int(order[at] - self.ends[file]) + parts, parts)
        # Drawn anew, because a lane that had the same one in each pass might have an empty one of a small file.
        shift = int(np.random.default_rng([*self.seed, passed, file]).integers(shares)) if shares > 1 else 0
        return passed, part, (int(index - ends[at]) + shift) % shares, shares

    def _order(self, passed: int) -> tuple[Integers, Integers]:
        """The order of all parts in a pass, and how many shares they have up to the end of each of them."""
        order = np.random.default_rng([*self.seed, passed]).permutation(int(self.parts.sum()))
        return order, np.cumsum(np.repeat(self.shares, self.parts)[order])

    def _chunks(self, number: int) -> Iterator[list[RawRecord]]:
        """The chunks of part `number` of all passes that belong to its lane."""
        passed, part, share, shares = self.locate(number)
        if shares == 1:
            return self._read(part)
        key = passed, part.file
        if key not in self.shared:
            (self.shared[key],) = itertools.tee(self._read_shared(key, part), 1)
        return itertools.islice(copy.copy(self.shared[key]), share, None, shares)

    def _read_shared(self, key: tuple[int, int], part: Part) -> Iterator[list[RawRecord]]:
        """The chunks of a file, for the lanes that begin it before the first SHARED_CHUNKS of them were read."""
        for number, records in enumerate(self._read(part)):
            if number == SHARED_CHUNKS:
                del self.shared[key]
            yield records
        self.shared.pop(key, None)

    def _read(self, part: Part, numbered: bool = False) -> Iterator[list[RawRecord]]:
        return chunks(read_part(self.source, part, numbered), LANE_CHUNK)

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


def cut(source: Source, lanes: int) -> tuple[Integers, Integers]:
    """The parts of each file, or of each shard of a data set, and how many lanes share each of them.

    A part has about as many bytes of text in all files. A lane reads several parts in a pass over a small text.
    """
    if source.dataset is not None and not is_table(source.dataset):
        shards = source.dataset.num_shards  # their sizes are not known
        return np.ones(shards, np.int64), np.full(shards, -(-lanes // shards))
    if source.dataset is not None:
        sizes, whole, limits = np.array([source.dataset.data.nbytes]), np.array([False]), np.array([PART])
        most = np.array([len(source.dataset)])
    else:
        sizes = np.array([size_of_file(path) for path in source.files])
        whole = np.array([not can_cut(path) for path in source.files])
        rows = np.array([file_format(path) == ".parquet" for path in source.files])
        packed = np.array([path.suffix.lower() in COMPRESSIONS for path in source.files])
        most, sizes = sizes, sizes * np.where(packed | rows, COMPRESSED, 1)
        limits = np.where(rows, ROWS_PART, PART)
    of_a_lane = sizes.sum() / lanes
    part = np.minimum(np.maximum(of_a_lane / PARTS_OF_A_LANE, LANE_CHUNK), limits)
    parts = np.where(whole, 1, np.minimum(-(-sizes // part), most)).astype(np.int64)
    shares = np.where(whole, np.ceil(sizes / np.maximum(of_a_lane / SHARES_OF_A_LANE, LANE_CHUNK)), 1).astype(np.int64)
    return np.maximum(parts, 1), np.clip(shares, 1, lanes)
