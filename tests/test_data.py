"""Proves data/tokens.py, data/batches.py and data/prepare.py: no token lost or repeated, on any number of ranks."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.utils.data import DistributedSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from config.errors import OptionError
from config.options import Options
from data.batches import IGNORE_INDEX, collate, draw, micro_batches, validation_batches
from data.prepare import Data, prepare_data
from data.records import FRAGMENT, read
from data.sequences import Mixture, PreparedDataset
from data.sources import find_sources
from data.stream import StreamingDataset
from tests import world


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(data_cache_dir=str(tmp_path / "cache"), block_size=32, validation_split_percentage=0)


def tokens_of(sequences: PreparedDataset | Mixture | StreamingDataset | None) -> list[int]:
    assert isinstance(sequences, PreparedDataset | Mixture)
    return [int(token) for index in range(len(sequences)) for token in sequences[index].tokens]


def expected_tokens(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[int]:
    """The tokens that `concat` must give, computed the slow way: those of each document and one EOS."""
    return [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def write(path: Path, documents: list[str]) -> Path:
    """Write `documents` in the format of the suffix of `path`. A .txt file holds them all as one."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in documents))
        case ".parquet":
            datasets.Dataset.from_dict({"text": documents}).to_parquet(str(path))
        case ".txt":
            path.write_text("".join(documents))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("workers", [None, 2])
def test_no_token_is_lost(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    tmp_path: Path,
    suffix: str,
    workers: int | None,
) -> None:
    """Sequences are the documents with an EOS after each. Only the last partial sequence is dropped, and counted."""
    options.train_file = str(write(tmp_path / f"text{suffix}", documents))
    options.preprocessing_num_workers = workers
    data = prepare_data(options, tokenizer)
    expected = expected_tokens(tokenizer, ["".join(documents)] if suffix == ".txt" else documents)
    counts = data.counts["train"]
    assert tokens_of(data.train) == expected[: len(expected) - counts.dropped_tokens]
    assert counts.dropped_tokens == len(expected) % 32
    assert counts.tokens == len(expected)
    assert counts.documents == (1 if suffix == ".txt" else len(documents))
    assert all(len(data.train[index].tokens) == 32 for index in range(len(data.train)))


def test_data_set_directory(
    options: Options, tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """--dataset_name takes a local directory, and uses the validation split of the data set."""
    directory = tmp_path / "set"
    directory.mkdir()
    write(directory / "train.jsonl", documents[:150])
    write(directory / "validation.jsonl", documents[150:])
    options.dataset_name = str(directory)
    data = prepare_data(options, tokenizer)
    for sequences, texts in ((data.train, documents[:150]), (data.validation["eval"], documents[150:])):
        tokens = tokens_of(sequences)
        assert tokens == expected_tokens(tokenizer, texts)[: len(tokens)]


def test_text_column(
    options: Options, tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """--text_column names another column than `text`."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "content": text}) + "\n" for text in documents))
    options.train_file, options.text_column = str(path), "content"
    tokens = tokens_of(prepare_data(options, tokenizer).train)
    assert tokens == expected_tokens(tokenizer, documents)[: len(tokens)]


def test_packing_none(
    options: Options, tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """Each document has its own sequences. A longer document fills several, and no token is dropped."""
    documents = [*documents, " ".join(documents) * 3]
    options.train_file, options.packing = str(write(tmp_path / "text.jsonl", documents)), "none"
    data = prepare_data(options, tokenizer)
    sequences = iter(data.train[index].tokens.tolist() for index in range(len(data.train)))
    for text in documents:
        tokens = expected_tokens(tokenizer, [text])
        for start in range(0, len(tokens), 32):
            assert next(sequences) == tokens[start : start + 32]
    assert next(sequences, None) is None
    assert data.counts["train"].dropped_tokens == 0


def test_pieces_of_a_large_text(options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A .txt file is read in fragments. Text and tokens are exactly those of the whole file."""
    text = "".join(f"def f{i}():\n\n\n    return {i}  \n \n\t\n" * (i % 5) + f"x{i}\r\n" for i in range(4000))
    path = tmp_path / "large.txt"
    path.write_bytes(text.encode())
    options.train_file = str(path)
    (source,), _ = find_sources(options)
    fragments = list(read(source))
    assert len(fragments) > 5
    texts = [cast(Any, fragment.content)["text"] for fragment in fragments]
    assert max(map(len, texts)) < 2 * FRAGMENT
    assert "".join(texts) == text
    assert [fragment.begins for fragment in fragments] == [True] + [False] * (len(fragments) - 1)
    assert [fragment.ends for fragment in fragments] == [False] * (len(fragments) - 1) + [True]
    tokens = tokens_of(prepare_data(options, tokenizer).train)
    assert tokens == expected_tokens(tokenizer, [text])[: len(tokens)]


def test_bos_once_per_document(options: Options, model_dir: Path, tmp_path: Path) -> None:
    """If the tokenizer begins a text with BOS, each document begins with it, but not each fragment of a large file."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    bos = tokenizer.convert_tokens_to_ids("!")
    template = processors.TemplateProcessing(single="! $A", special_tokens=[("!", bos)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.bos_token = "!"
    options.train_file, options.packing = str(tmp_path / "large.txt"), "none"
    Path(options.train_file).write_text("one two\n" * FRAGMENT)
    tokens = tokens_of(prepare_data(options, tokenizer).train)
    assert tokens[0] == bos
    assert tokens[-1] == tokenizer.eos_token_id
    assert (tokens.count(bos), tokens.count(tokenizer.eos_token_id)) == (1, 1)


def test_split_is_by_document(
    options: Options, tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path
) -> None:
    """The last documents are held out as a whole. Together, the splits have all documents."""
    options.train_file = str(write(tmp_path / "text.jsonl", documents))
    options.validation_split_percentage, options.packing = 10, "none"
    data = prepare_data(options, tokenizer)
    assert (data.counts["train"].documents, data.counts["validation"].documents) == (180, 20)
    assert tokens_of(data.train) == expected_tokens(tokenizer, documents[:180])
    assert tokens_of(data.validation["eval"]) == expected_tokens(tokenizer, documents[180:])


def test_embedded_split_is_by_file(
    options: Options, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation split of the demo's text starts where a file starts. Every twentieth file is tried."""
    (source,), _ = find_sources(options)
    assert len(source.files) > 400
    assert not any("/test/" in str(path) or "/tests/" in str(path) for path in source.files)
    files = [path for path in source.files[::20] if isinstance(path, Path)]
    monkeypatch.setattr("data.sources.demo_files", lambda: files)
    options.validation_split_percentage, options.packing = 10, "none"
    data = prepare_data(options, tokenizer)
    number = data.counts["validation"].documents
    assert number
    held_out = [path.read_bytes().decode(errors="replace") for path in files[-number:]]
    assert data.counts["train"].documents + number == len(files) - data.counts["train"].empty_documents
    assert tokens_of(data.validation["eval"]) == expected_tokens(tokenizer, held_out)


@pytest.mark.fault(
    "data",
    "empty documents",
    "left out and counted; the other documents have the same tokens",
)
def test_empty_and_missing_documents(options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Empty documents are skipped and counted. A record without text is an error that names it."""
    texts = ["one two three " * 20, "", "four five six " * 20]
    options.train_file = str(write(tmp_path / "empty.jsonl", texts))
    data = prepare_data(options, tokenizer)
    assert (data.counts["train"].documents, data.counts["train"].empty_documents) == (2, 1)
    assert tokens_of(data.train) == expected_tokens(tokenizer, [texts[0], texts[2]])[: len(tokens_of(data.train))]
    path = tmp_path / "null.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n')
    options.train_file = str(path)
    with pytest.raises(OptionError, match=r"null.jsonl: line 2 has no text in column text"):
        prepare_data(options, tokenizer)


def test_cache_is_keyed_by_content(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data are prepared once, and again for other content, even of the same size and time, or another block size."""
    path = write(tmp_path / "text.jsonl", documents)
    options.train_file = str(path)
    cache = Path(options.data_cache_dir)

    def entries() -> int:
        return len([entry for entry in cache.iterdir() if entry.is_dir()])

    first = prepare_data(options, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("data.cache._write", lambda *_: pytest.fail("prepared a second time"))
        assert prepare_data(options, tokenizer).fingerprint == first.fingerprint
    assert entries() == 1
    times = path.stat()
    path.write_text(path.read_text().replace("the", "eht"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare_data(options, tokenizer).fingerprint != first.fingerprint
    options.block_size = 16
    assert prepare_data(options, tokenizer).fingerprint != first.fingerprint
    assert entries() == 3


def global_batches(
    sequences: int, world_size: int, micro_batch: int, accumulation: int, steps: int
) -> Iterator[list[int]]:
    """The sequences of each step, gathered from all ranks as train.py distributes them."""
    for step in range(steps):
        batch = []
        for rank in range(world_size):
            sampler: Any = DistributedSampler(
                cast(Any, range(sequences)), num_replicas=world_size, rank=rank, shuffle=True, seed=42, drop_last=True
            )
            first = step * accumulation
            for indices in micro_batches(draw(sampler, np.arange(sequences)), micro_batch, first, first + accumulation):
                batch += indices
        yield sorted(batch)


def test_global_batch_does_not_depend_on_ranks() -> None:
    """101 sequences are the same 8 global batches of 12 on any number of ranks. The last 5 are left over."""
    reference = list(global_batches(101, 1, 12, 1, steps=8))
    assert len({sequence for batch in reference for sequence in batch}) == 8 * 12, "no sequence twice in an epoch"
    for world_size, micro_batch, accumulation in ((1, 3, 4), (2, 6, 1), (2, 2, 3), (3, 2, 2), (4, 3, 1), (4, 1, 3)):
        assert list(global_batches(101, world_size, micro_batch, accumulation, steps=8)) == reference


@pytest.mark.parametrize("sequences", [101, 70_000])
def test_an_epoch_is_that_of_the_sampler(sequences: int) -> None:
    """Without a list of all its numbers: the order of DistributedSampler for each rank, seed and epoch."""
    for world_size in (1, 2, 7):
        for rank in range(world_size):
            sampler: Any = DistributedSampler(
                cast(Any, range(sequences)), num_replicas=world_size, rank=rank, shuffle=True, seed=7, drop_last=True
            )
            for epoch in (0, 3):
                sampler.set_epoch(epoch)
                numbers = np.arange(sequences) * 3
                assert draw(sampler, numbers).tolist() == numbers[list(sampler)].tolist()


@pytest.mark.fault(
    "data",
    "validation sequences that the ranks do not divide",
    "each sequence counts once, over all ranks",
)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sequences", [1, 2, 5, 23, 24])
@pytest.mark.parametrize("size", [1, 4])
def test_validation_rows_count_once(world_size: int, sequences: int, size: int) -> None:
    """Each sequence is on one rank, and all ranks have the same number of forwards."""
    batches = [validation_batches(sequences, rank, world_size, size) for rank in range(world_size)]
    assert sorted(sequence for rank in batches for batch in rank for sequence in batch) == list(range(sequences))
    assert len({len(rank) for rank in batches}) == 1
    assert max(len(batch) for rank in batches for batch in rank) <= size


def test_collate_masks_by_length() -> None:
    """Padding is masked by its position. EOS, with which many tokenizers pad, is trained on."""
    batch = collate([world.row(torch.tensor([5, 6, 0]), 3), world.row(torch.tensor([7]), 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 0], [7, IGNORE_INDEX, IGNORE_INDEX]]
    assert (batch["indices"].tolist(), batch["tokens"].tolist(), int(batch["targets"])) == ([3, 1], [3, 1], 2)
    nothing = collate([])
    assert (int(nothing["tokens"].sum()), int(nothing["targets"])) == (0, 0)
    assert nothing["input_ids"].shape == (1, 2)


def test_rows_travel_by_path(options: Options, tokenizer: PreTrainedTokenizerBase, train_file: Path) -> None:
    """A worker process that is not forked gets the path of the memory map, not its content."""
    options.train_file = str(train_file)
    data: Data = prepare_data(options, tokenizer)
    pickled = pickle.dumps(data.train)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[3].tokens, data.train[3].tokens)
