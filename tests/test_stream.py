"""Proves data/stream.py: no token lost or repeated, on any number of ranks and after any resume."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import data.records
from config.errors import OptionError
from config.options import Options
from data.ledger import differences, problems
from data.prepare import prepare_data
from data.sequences import Sequence
from data.stream import Cursor, StreamingDataset
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
        yield sorted(sequences, key=lambda sequence: sequence.cursor[4] % LANES)


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
    passes: dict[int, list[Sequence]] = {}
    for step in steps_of(stream, 1, []):
        for sequence in step:
            passes.setdefault(sequence.cursor[0], []).append(sequence)
        if min(sequence.cursor[0] for sequence in step) == 2:
            break
    expected = sorted(expected_tokens(tokenizer, documents))
    for sequences in (passes[0], passes[1]):
        assert len({sequence.number for sequence in sequences}) == len(sequences)
        assert sorted(torch.cat([sequence.tokens for sequence in sequences]).tolist()) == expected
        assert all(len(sequence.tokens) <= 32 for sequence in sequences)
    orders = [
        [sequence.cursor[1:4] for sequence in sorted(passes[epoch], key=lambda sequence: sequence.number)]
        for epoch in (0, 1)
    ]
    assert orders[0] != orders[1] or packing != "concat"


def test_a_large_text(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fragments of a .txt file are one document if they are in one chunk."""
    monkeypatch.setattr("data.stream.LANE_CHUNK", 1 << 16)
    path = tmp_path / "large.txt"
    path.write_text("one two\n" * 6000)
    stream = stream_of(path, tokenizer, packing="none")
    sequences = [sequence for sequence in islice(stream.shard(0, 1, 1, []), 10_000) if sequence.cursor[0] == 0]
    assert [len(sequence.tokens) for sequence in sequences[:-1]] == [32] * (len(sequences) - 1)
    assert torch.cat([sequence.tokens for sequence in sequences]).tolist() == expected_tokens(
        tokenizer, [path.read_text()]
    )


def test_concat_keeps_the_order_of_the_text(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """Sorted by their numbers, the sequences of a file are its text."""
    path = write(tmp_path / "a.jsonl", documents)
    sequences: list[Sequence] = []
    for step in steps_of(stream_of(path, tokenizer), 1, []):
        sequences += [sequence for sequence in step if sequence.cursor[0] == 0]
        if min(sequence.cursor[0] for sequence in step) == 1:
            break
    tokens = torch.cat([sequence.tokens for sequence in sorted(sequences, key=lambda sequence: sequence.number)])
    assert tokens.tolist() == expected_tokens(tokenizer, documents)


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_ranks_and_resumes_do_not_matter(folder: Path, tokenizer: PreTrainedTokenizerBase, packing: str) -> None:
    """Global batches are the same on any number of ranks, from the start and from any step, also in later passes."""
    stream = stream_of(folder, tokenizer, packing=packing)
    reference = list(islice(steps_of(stream, 1, []), 330))
    assert reference[-30][0].cursor[0] > 0
    for world_size in (2, 3, 6):
        assert all(map(same, islice(steps_of(stream, world_size, []), 330), reference))
    for world_size, done in ((1, 1), (2, 17), (3, 100), (6, 101), (2, 320)):
        cursor = [list(sequence.cursor) for sequence in reference[done - 1]]
        assert all(map(same, islice(steps_of(stream, world_size, cursor), 10), reference[done:])), done


def test_a_resume_reads_on_from_there(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume does not read what is before the first chunk that a lane is in."""
    stream = stream_of(folder, tokenizer)
    (reached,) = islice(steps_of(stream, 1, []), 120, 121)
    starts = []

    def read_noting(source: object, start: object) -> object:
        starts.append(start)
        return data.records.read(source, start)  # type: ignore[arg-type]

    monkeypatch.setattr("data.stream.read", read_noting)
    cursor = [list(sequence.cursor) for sequence in reached]
    next(steps_of(stream, 1, cursor))
    first = min(cursor, key=lambda one: one[4])
    assert starts[0] == tuple(first[1:4]) != (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "turns",
    [
        [(2, 5, ()), (3, 12, ()), (1, 20, ())],
        pytest.param([(4, 5, TENSOR), (1, 20, ())], marks=pytest.mark.slow),
    ],
    ids=["ranks", "tensor parallel"],
)
def test_training(
    tiny: list[object], folder: Path, tmp_path: Path, turns: list[tuple[int, int, tuple[str, ...]]]
) -> None:
    """An uninterrupted run and a run on two, three and one ranks in turn have the same global batches and losses."""
    options = [*tiny, "--train_file", folder, "--streaming", "--validation_file", folder / "a.jsonl", "--ledger"]
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
    with pytest.raises(OptionError, match="no sequence in 1000 chunks"):
        next(steps_of(stream_of(path, tokenizer), 1, []))
