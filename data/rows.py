"""Rows of tokens: documents are tokenised and packed once, kept on disk and memory-mapped.

A prepared split is two flat files: `tokens.bin` (uint32, all tokens in a line) and `starts.bin` (int64, where each row
starts, and where the last one ends).
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import OptionError, Options
from data.corpus import Source, find_sources, read_documents

FORMAT = 2  # raised when prepared files of an older version can no longer be read


Row = tuple[int, Tensor]
"""A row's number in its split, and its tokens: int64, at most block_size of them."""


class Rows(torch.utils.data.Dataset[Row]):
    """The rows of a prepared split, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
        self.starts = np.memmap(folder / "starts.bin", np.int64, "r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Row:
        return index, torch.from_numpy(self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Rows, (self.folder,)  # to a worker process travels the path, not the file


@dataclass(frozen=True)
class Split:
    """What was counted while a split was prepared. `dropped_tokens` are those of its last, partial row."""

    rows: int
    documents: int
    empty_documents: int
    tokens: int
    dropped_tokens: int


@dataclass(frozen=True)
class Data:
    """Training and validation rows, with their counts and a fingerprint (SHA-256) of all their tokens."""

    source: str
    tokenizer: str
    fingerprint: str
    train: Rows
    validation: Rows | None
    counts: dict[str, Split]


def prepare(options: Options, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows that `options` ask for, from the cache or made now. Raises OptionError.

    Every rank may call this before there is a process group: the first one to come prepares, the others wait for its
    lock, as long as that takes, and read what it wrote.
    """
    train, validation = find_sources(options)
    key = _cache_key(options, tokenizer, train, validation)
    cache = Path(options.data_cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{key}.lock")
        lock.acquire()
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror}; give a directory that can be written") from error
    try:
        if not (cache / key).exists():
            scratch = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=cache))
            try:
                _write(scratch, options, tokenizer, train, validation)
                (scratch / "prepared").rename(cache / key)
            finally:
                shutil.rmtree(scratch)
    finally:
        lock.release()
    name = options.tokenizer_name or tokenizer.name_or_path or "embedded"
    return _open(cache / key, train.name, f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens, {name}")


def _cache_key(options: Options, tokenizer: PreTrainedTokenizerBase, train: Source, validation: Source | None) -> str:
    """Changes with everything that the rows depend on: content, tokenizer, row length, packing and split."""
    facts = [
        FORMAT,
        train.key,
        validation.key if validation else options.validation_split_percentage,
        options.text_column,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.eos_token_id,
        options.block_size,
        options.packing,
    ]
    return "rows-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _write(
    scratch: Path, options: Options, tokenizer: PreTrainedTokenizerBase, train: Source, validation: Source | None
) -> None:
    """Prepare both splits into `scratch`/prepared, with what was counted in about.json."""
    percentage = options.validation_split_percentage
    splits = {"train": (train, read_documents(train, options.text_column, scratch))}
    if validation:
        splits["validation"] = (validation, read_documents(validation, options.text_column, scratch))
    elif percentage:
        documents = splits["train"][1]
        first = _first_held_out(documents, percentage)
        splits["train"] = (train, documents.select(range(first)))
        splits["validation"] = (train, documents.select(range(first, len(documents))))
    digest = hashlib.sha256()
    counts = {}
    for name, (source, documents) in splits.items():
        folder = scratch / "prepared" / name
        folder.mkdir(parents=True)
        tokens = _tokenize(documents, source, options, tokenizer, scratch / f"{name}.arrow")
        counts[name] = _pack(tokens, folder, options, tokenizer.eos_token_id, digest)
        if counts[name].rows == 0:
            raise OptionError(
                f"{source.name}: the {name} split has {counts[name].tokens} tokens, less than one row of block_size "
                f"{options.block_size}\ngive more text, a smaller --block_size or another --validation_split_percentage"
            )
    about = {"fingerprint": digest.hexdigest(), "counts": {name: asdict(split) for name, split in counts.items()}}
    (scratch / "prepared" / "about.json").write_text(json.dumps(about, indent=2))


def _first_held_out(documents: datasets.Dataset, percentage: int) -> int:
    """The first row of the last `percentage`, moved on to where a document starts if one still does."""
    first = math.floor(len(documents) * (1 - percentage / 100))
    if "ends" in documents.column_names:
        for row in range(first, len(documents)):
            if row > 0 and documents[row - 1]["ends"]:
                return row
    return first


def _tokenize(
    documents: datasets.Dataset, source: Source, options: Options, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> datasets.Dataset:
    """Token ids of each row, in parallel. Empty documents become empty rows.

    EOS closes each document; BOS opens it where the tokenizer itself would put one (Llama and Gemma do, Qwen not).
    """
    # The tokenizer's threads need not fear the workers that a DataLoader forks later: those use no tokenizer.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    eos = [tokenizer.eos_token_id]

    def tokenize(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        for index, text in zip(indices, batch["text"], strict=True):
            if text is None:
                raise OptionError(f"{source.name}: row {index} has no text in column {options.text_column}")
        rows = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        every = [True] * len(batch["text"])
        pieces = zip(rows["input_ids"], batch.get("begins", every), batch.get("ends", every), strict=True)
        return {"tokens": [bos * begins + row + eos * ends if row else [] for row, begins, ends in pieces]}

    return documents.map(
        tokenize,
        batched=True,
        with_indices=True,
        num_proc=options.preprocessing_num_workers,
        remove_columns=documents.column_names,
        features=datasets.Features({"tokens": datasets.List(datasets.Value("uint32"))}),
        cache_file_name=str(cache),
        desc=f"Tokenising {cache.stem}",
        new_fingerprint=cache.stem,  # the default is a hash of the tokenizer object, which is slow and unstable
    )


def _pack(documents: datasets.Dataset, folder: Path, options: Options, eos: int, digest: Any) -> Split:
    """Write tokens.bin and starts.bin. No token is lost but those of a last, partial row (packing concat)."""
    assert options.block_size
    documents_ended = empty = total = 0
    lengths = []
    with open(folder / "tokens.bin", "wb") as file:
        for batch in documents.with_format("arrow").iter(batch_size=1000):
            rows = batch["tokens"].combine_chunks()
            tokens = rows.flatten().to_numpy().astype(np.uint32)
            file.write(tokens.tobytes())
            digest.update(tokens.tobytes())
            lengths.append(rows.value_lengths().to_numpy())
            total += len(tokens)
            empty += int((lengths[-1] == 0).sum())
            last_tokens = tokens[np.cumsum(lengths[-1][lengths[-1] > 0]) - 1]
            documents_ended += int((last_tokens == eos).sum())
    if options.packing == "concat":
        starts = np.arange(0, total + 1, options.block_size, dtype=np.int64)
    else:
        all_lengths = np.concatenate([*lengths, np.zeros(0, np.int64)])
        ends = np.cumsum(all_lengths)
        cuts = [np.arange(start, end, options.block_size) for start, end in zip(ends - all_lengths, ends, strict=True)]
        starts = np.concatenate([*cuts, [total]]).astype(np.int64)
    starts.tofile(folder / "starts.bin")
    digest.update(starts.tobytes())
    return Split(len(starts) - 1, documents_ended, empty, total, int(total - starts[-1]))


def _open(folder: Path, source: str, tokenizer: str) -> Data:
    about = json.loads((folder / "about.json").read_text())
    counts = {name: Split(**values) for name, values in about["counts"].items()}
    rows = {name: Rows(folder / name) for name in counts}
    return Data(source, tokenizer, about["fingerprint"], rows["train"], rows.get("validation"), counts)
