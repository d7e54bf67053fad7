"""Proves data/stream.py: no token lost or repeated, on any number of ranks and after any resume."""

import io
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from config.errors import OptionError
from config.options import Options
from data.ledger import differences, problems
from data.prepare import prepare_data
from data.records import Part, RawRecord
from data.sequences import Sequence
from data.stream import Cursor, StreamingDataset, TextReader
from data.tokens import Encoded, Rendering, encoder
from metrics.records import read_records
from tests.launch import train_ok
from tests.proof import TENSOR
from tests.test_data import expected_tokens
from tests.test_errors import refused
from tests.test_prepare import write

LANES = 6


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small text a large one: tens of chunks."""
    monkeypatch.setattr("data.stream.LANE_CHUNK", 2000)


@pytest.fixture
def folder(documents: list[str], tmp_path: Path) -> Path:
    """Documents of a few hundred words in files of several kinds."""
    parts = {"a.jsonl": documents[:80], "b.jsonl.gz": documents[80:120], "c.parquet": documents[120:]}
    for name, texts in parts.items():
        write(tmp_path / "text" / name, texts)
    return tmp_path / "text"


def stream_of(folder: Path, tokenizer: PreTrainedTokenizerBase, **settings: object) -> StreamingDataset:
    cache = str(folder.parent / "cache")
    options = Options(train_file=str(folder), streaming=True, max_steps=1, block_size=32, data_cache_dir=cache)
    for name, value in settings.items():
        setattr(options, name, value)
    train = prepare_data(options, tokenizer).train
    assert isinstance(train, StreamingDataset)
    return train


def steps_of(stream: StreamingDataset, world_size: int, cursor: Cursor) -> Iterator[list[Sequence]]:
    """The global batches after a cursor, gathered from all ranks, in the order of lanes."""
    streams = [iter(stream.shard(rank, world_size, LANES, cursor)) for rank in range(world_size)]
    while True:
        sequences = [sequence for stream_of_rank in streams for sequence in islice(stream_of_rank, LANES // world_size)]
        yield sorted(sequences, key=lambda sequence: sequence.cursor[0])


def places_of(stream: StreamingDataset, sequences: list[Sequence]) -> list[tuple[int, Part, int]]:
    """The pass, the part and the number there of each sequence of a stream of one source."""
    (text,) = stream.texts
    reader = TextReader(text, stream.packing, (stream.seed, 0), LANES)
    return [(*reader.locate(sequence.cursor[1])[:2], sequence.number) for sequence in sequences]


def passes_of(stream: StreamingDataset, number: int) -> list[list[Sequence]]:
    """The sequences of the first passes."""
    passes: list[list[Sequence]] = [[] for _ in range(number)]
    for step in steps_of(stream, 1, []):
        places = places_of(stream, step)
        for sequence, (passed, _, _) in zip(step, places, strict=True):
            if passed < number:
                passes[passed].append(sequence)
        if min(passed for passed, _, _ in places) >= number:
            return passes
    raise AssertionError("a stream has no end")


def same(ours: list[Sequence], theirs: list[Sequence]) -> bool:
    return all(
        (one.number, one.cursor, one.segment_lengths) == (other.number, other.cursor, other.segment_lengths)
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(one.trained_on, other.trained_on)
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_nothing_is_lost_or_repeated(
    folder: Path, tokenizer: PreTrainedTokenizerBase, documents: list[str], packing: str
) -> None:
    """Each pass has every token of every document once, and the next pass has another order."""
    stream = stream_of(folder, tokenizer, packing=packing)
    passes = passes_of(stream, 2)
    expected = sorted(expected_tokens(tokenizer, documents))
    for sequences in passes:
        assert len({sequence.number for sequence in sequences}) == len(sequences)
        assert sorted(torch.cat([sequence.tokens for sequence in sequences]).tolist()) == expected
        assert all(len(sequence.tokens) <= 32 for sequence in sequences)
    parts = [[part for _, part, _ in places_of(stream, sequences)] for sequences in passes]
    assert {part.parts > 1 for part in parts[0]} == {True, False}  # lines and rows are cut, a compressed file is not
    assert sorted(parts[0]) == sorted(parts[1])
    assert parts[0] != parts[1]


def test_a_large_text(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fragments of a .txt file are one document if they are in one chunk."""
    monkeypatch.setattr("data.stream.LANE_CHUNK", 1 << 16)
    path = tmp_path / "large.txt"
    path.write_text("one two\n" * 6000)
    stream = stream_of(path, tokenizer, packing="none")
    sequences = list(islice(stream.shard(0, 1, 1, []), len(expected_tokens(tokenizer, [path.read_text()])) // 32 + 1))
    assert [len(sequence.tokens) for sequence in sequences[:-1]] == [32] * (len(sequences) - 1)
    assert torch.cat([sequence.tokens for sequence in sequences]).tolist() == expected_tokens(
        tokenizer, [path.read_text()]
    )


def test_concat_keeps_the_order_of_the_text(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """Sorted by part and number, the sequences of a file are its text."""
    stream = stream_of(write(tmp_path / "a.jsonl", documents), tokenizer)
    (sequences,) = passes_of(stream, 1)
    places = places_of(stream, sequences)
    assert len({part for _, part, _ in places}) > 40
    in_order = sorted(zip(places, sequences, strict=True), key=lambda pair: pair[0])
    assert torch.cat([sequence.tokens for _, sequence in in_order]).tolist() == expected_tokens(tokenizer, documents)


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_ranks_and_resumes_do_not_matter(folder: Path, tokenizer: PreTrainedTokenizerBase, packing: str) -> None:
    """Global batches are the same on any number of ranks, from the start and from any step, also in later passes."""
    stream = stream_of(folder, tokenizer, packing=packing)
    reference = list(islice(steps_of(stream, 1, []), 480))
    assert min(passed for passed, _, _ in places_of(stream, reference[-30])) > 0
    for world_size in (2, 3, 6):
        assert all(map(same, islice(steps_of(stream, world_size, []), 480), reference))
    for world_size, done in ((1, 1), (2, 17), (3, 100), (6, 101), (2, 470)):
        cursor = [list(sequence.cursor) for sequence in reference[done - 1]]
        assert all(map(same, islice(steps_of(stream, world_size, cursor), 10), reference[done:])), done


def test_a_resume_tokenizes_no_earlier_chunk(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each lane, a resume makes only the chunk again in which the lane is, and then goes on."""
    stream = stream_of(folder, tokenizer)
    (reached,) = islice(steps_of(stream, 1, []), 120, 121)
    encoded: list[int] = []

    def counted(rendering: Rendering) -> Callable[[list[RawRecord]], Encoded]:
        encode = encoder(rendering)
        return lambda records: encoded.append(len(records)) or encode(records)  # type: ignore[func-returns-value]

    monkeypatch.setattr("data.stream.encoder", counted)
    streams = stream.shard(0, 1, LANES, [list(sequence.cursor) for sequence in reached])
    list(islice(streams, LANES))
    assert LANES <= len(encoded) <= 2 * LANES  # two if a lane was at the end of its chunk


def test_the_cursor_of_an_earlier_version(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its places are of another order, so it is refused."""
    with pytest.raises(
        OptionError, match=r"resume_from_checkpoint: an earlier version .*\nresume it with that version"
    ):
        stream_of(folder, tokenizer).shard(0, 1, LANES, [[0, 0, 4096, 12, 7, 2]] * LANES)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a text file, as they are read."""
    counted: list[int] = []

    class CountingFile(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            counted.append(size := super().readinto(buffer))
            return size

        def readall(self) -> bytes:
            raise AssertionError("a file is read to its end")

    monkeypatch.setattr("data.files.bounded.open", lambda path, _: io.BufferedReader(CountingFile(path)), raising=False)
    return counted


def test_a_rank_reads_only_its_parts(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path, bytes_read: list[int]
) -> None:
    """The bytes that a rank reads in a pass fall as 1/N, on 1, 2 and 4 ranks."""
    path = write(tmp_path / "a.jsonl", documents * 20)
    stream, lanes, steps = stream_of(path, tokenizer), 16, 1000
    read: dict[int, list[int]] = {}
    for world_size in (1, 2, 4):
        read[world_size] = []
        for rank in range(world_size):
            before = sum(bytes_read)
            list(islice(stream.shard(rank, world_size, lanes, []), steps * lanes // world_size))
            read[world_size].append(sum(bytes_read) - before)
    size = path.stat().st_size
    assert read[1][0] > size / 2
    assert max(read[2]) < 0.6 * read[1][0]
    assert max(read[4]) < 0.35 * read[1][0]
    opening = 10_000  # each rank looks at the beginning of the file
    assert all(abs(sum(read[number]) - read[1][0]) < number * opening for number in (2, 4))


def test_1024_ranks(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path, bytes_read: list[int]
) -> None:
    """Their first global batches are those of one rank, and each of them reads a few KB of the text."""
    path = write(tmp_path / "a.jsonl", documents * 40)
    stream, lanes, steps = stream_of(path, tokenizer), 1024, 3
    on_one_rank = list(islice(stream.shard(0, 1, lanes, []), steps * lanes))
    for rank in range(0, 1024, 16):
        before = sum(bytes_read)
        sequences = list(islice(stream.shard(rank, 1024, lanes, []), steps))
        assert same(sequences, on_one_rank[rank::lanes])
        assert sum(bytes_read) - before < 100_000 < path.stat().st_size / 20


def test_the_parts_of_a_terabyte(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: Any) -> None:
    """Each part has one place in a pass, and 1,024 ranks have as many bytes of it."""
    monkeypatch.setattr("data.stream.LANE_CHUNK", 1 << 16)
    for number in range(100):
        path = write(tmp_path / "text" / f"{number}.jsonl", ["some text"])
        os.truncate(path, 10**10 + number)
    stream = stream_of(tmp_path / "text", tokenizer)
    reader = TextReader(stream.texts[0], stream.packing, (42, 0), 2048)
    parts = int(reader.parts.sum())
    assert parts == pytest.approx(10**12 / 2**20, rel=1e-3)
    order, ends = reader.order(1)
    assert sorted(order.tolist()) == list(range(parts))
    assert ends.tolist() == list(range(1, parts + 1))
    for rank in (0, 511, 1023):
        mine = [reader.locate(number)[1] for lane in (rank, rank + 1024) for number in range(lane, parts, 2048)]
        assert len(set(mine)) == len(mine) == pytest.approx(parts / 1024, abs=2)
        assert {part.parts for part in mine} == {9537}  # of about 1 MiB each
        assert len({part.file for part in mine}) > 90


@pytest.mark.slow
@pytest.mark.parametrize(
    "turns",
    [
        [(2, 5, ()), (3, 12, ()), (1, 20, ())],
        [(4, 5, TENSOR), (1, 20, ())],
    ],
    ids=["ranks", "tensor parallel"],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["one source", "mixture"])
def test_training(
    tiny: list[object], folder: Path, tmp_path: Path, turns: list[tuple[int, int, tuple[str, ...]]], mixed: bool
) -> None:
    """An uninterrupted run and a run on two, three and one ranks in turn have the same global batches and losses."""
    source = ["--train_file", folder]
    if mixed:
        source = ["--train_mixture", f"{folder}/a.jsonl=0.5,{folder}/b.jsonl.gz=0.2,{folder}/c.parquet=0.3"]
        tiny = [*tiny[:2], *tiny[4:]]
    options = [*tiny, *source, "--streaming", "--validation_file", f"a={folder}/a.jsonl,b={folder}/b.jsonl.gz"]
    options.append("--ledger")
    options += ["--global_batch_size", 12, "--per_device_train_batch_size", 2]
    options += ["--lr_scheduler_type", "constant_with_warmup"]
    printed = train_ok(1, *options, "--max_steps", 20, "--output_dir", tmp_path / "one")
    assert "streamed" in printed
    for world_size, steps, strategy in turns:
        more = [*strategy, "--resume_from_checkpoint", "auto", "--max_steps", steps, "--dataloader_num_workers", 2]
        train_ok(world_size, *options, *more, "--output_dir", tmp_path / "many")
    assert problems(tmp_path / "one") == problems(tmp_path / "many") == []
    assert differences(tmp_path / "one", tmp_path / "many") == []
    losses = [
        [record["loss"] for record in read_records(tmp_path / run / "metrics.jsonl") if "loss" in record]
        for run in ("one", "many")
    ]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    state = json.loads((tmp_path / "many" / "checkpoint-20" / "state.json").read_text())
    assert len(state["progress"]["cursor"]) == 12


@pytest.fixture
def mixture(documents: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> StreamingDataset:
    """Two thirds of the sequences from a large source, a twelfth and a quarter from two small ones."""
    parts = {"large.jsonl": documents[:150], "small.jsonl.gz": documents[150:170], "b.jsonl": documents[170:]}
    for name, texts in parts.items():
        write(tmp_path / "text" / name, [f"{name[0]} {text}" for text in texts])
    weights = ",".join(f"{tmp_path}/text/{name}={weight}" for name, weight in zip(parts, (8, 1, 3), strict=True))
    return stream_of(tmp_path / "text", tokenizer, train_file=None, train_mixture=weights)


def test_a_mixture(mixture: StreamingDataset) -> None:
    """Each lane has the sources by weight, and each source is read as it is alone: all of it before any of it again."""
    steps = list(islice(steps_of(mixture, 1, []), 1200))
    source = np.array([[sequence.number % 3 for sequence in step] for step in steps])
    weights = np.array([8, 1, 3]) / 12
    for end in (12, 100, 1200):
        counts = np.bincount(source[:end].ravel(), minlength=3)
        assert np.abs(counts - weights * end * LANES).max() < 4
    for lane in range(LANES):
        assert np.abs(np.bincount(source[:, lane], minlength=3) / 1200 - weights).max() < 0.05
    for index, text in enumerate(mixture.texts):
        reader = TextReader(text, mixture.packing, (mixture.seed, index), LANES)
        for lane in range(LANES):
            mine = [step[lane] for step, drawn in zip(steps, source[:, lane], strict=True) if drawn == index]
            expected = islice(reader.sequences((lane, 0, 0, 0)), len(mine))
            assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(mine, expected, strict=True))


def test_ranks_and_resumes_of_a_mixture(mixture: StreamingDataset) -> None:
    """The places of all lanes in all sources are in the cursor."""
    reference = list(islice(steps_of(mixture, 1, []), 200))
    for world_size in (2, 3, 6):
        assert all(map(same, islice(steps_of(mixture, world_size, []), 200), reference))
    for world_size, done in ((1, 1), (2, 17), (3, 100), (6, 191)):
        cursor = [list(sequence.cursor) for sequence in reference[done - 1]]
        assert all(map(same, islice(steps_of(mixture, world_size, cursor), 9), reference[done:])), done


def test_changed_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A stream is not read before training. A change shows in the sizes and times of its files."""
    options = Options(train_file=str(folder), streaming=True, max_steps=1, block_size=32)
    options.data_cache_dir = str(folder.parent / "cache")
    before = prepare_data(options, tokenizer).fingerprint
    assert prepare_data(options, tokenizer).fingerprint == before
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text() + '{"text": "more"}\n')
    assert prepare_data(options, tokenizer).fingerprint != before


def test_a_data_set(documents: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """--dataset_name streams through `datasets`, and resumes on another number of ranks."""
    write(tmp_path / "set" / "train.jsonl", documents[:150])
    write(tmp_path / "set" / "validation.jsonl", documents[150:])
    stream = stream_of(tmp_path / "set", tokenizer, train_file=None, dataset_name=str(tmp_path / "set"))
    reference = list(islice(steps_of(stream, 1, []), 60))
    cursor = [list(sequence.cursor) for sequence in reference[29]]
    assert all(map(same, islice(steps_of(stream, 2, cursor), 30), reference[30:]))


def test_a_row_without_text(
    tiny: list[object], tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """A record without text is an error that names it, also in the middle of training and in a loader process."""
    path = write(tmp_path / "a.jsonl", [*documents, None])
    with pytest.raises(OptionError, match=f"{path}: line 201 has no text"):
        list(islice(steps_of(stream_of(path, tokenizer), 1, []), 2000))
    options = [*tiny, "--train_file", path, "--streaming", "--dataloader_num_workers", 1, "--output_dir", tmp_path]
    assert refused(*options) == f"{path}: line 201 has no text in column text: None\n"
    path = write(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(OptionError, match="no sequence in 10,000 chunks"):
        next(steps_of(stream_of(path, tokenizer), 1, []))
