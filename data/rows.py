"""Rows of tokens: documents are tokenised and packed once, kept on disk and memory-mapped.

A prepared split is three flat files: `tokens.bin` (uint32, the tokens of all documents in a line; the highest bit of
one that is not learned is set), `pieces.bin` (int64, where each piece of that line starts and ends) and `rows.bin`
(int64, the first piece of each row, and the number of all pieces).
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import OptionError, Options
from data.corpus import Source, find_sources, read_records
from data.encode import GIVEN, Fate, encoder, readable, recognise, records_of
from data.packing import Integers, pack

ENCODED = datasets.Features({"tokens": datasets.List(datasets.Value("uint32")), "fate": datasets.Value("uint8")})
FORMAT = 3  # raised when prepared files of an older version can no longer be read


class Row(NamedTuple):
    """What one row of a batch is made of: at most block_size tokens, T, of one document or of several."""

    number: int  # in its split
    tokens: Tensor  # int64 [T]
    learned: Tensor  # bool [T]
    lengths: list[int]  # of the pieces between which there is no attention; their sum is T


class Rows(torch.utils.data.Dataset[Row]):
    """The rows of a prepared split, read on demand. `documents_of` is their length, where documents share a row.

    `reference`, fp32 [2, rows], is for whoever trains on pairs to set: the log-probability that a reference model gives
    to what is learned of each chosen (0) and rejected (1) sequence.
    """

    def __init__(self, folder: Path, documents_of: int | None) -> None:
        self.folder, self.documents_of = folder, documents_of
        self.reference: Tensor | None = None
        self.tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
        self.pieces = np.memmap(folder / "pieces.bin", np.int64, "r").reshape(-1, 2)
        self.first_pieces = np.memmap(folder / "rows.bin", np.int64, "r")

    def __len__(self) -> int:
        return len(self.first_pieces) - 1

    def __getitem__(self, index: int) -> Row:
        pieces = self.pieces[self.first_pieces[index] : self.first_pieces[index + 1]]
        tokens = torch.from_numpy(np.concatenate([self.tokens[start:end] for start, end in pieces]).astype(np.int64))
        return Row(index, tokens & ~GIVEN, tokens < GIVEN, (pieces[:, 1] - pieces[:, 0]).tolist())

    def __reduce__(self) -> tuple[type, tuple[Path, int | None]]:
        return Rows, (self.folder, self.documents_of)  # to a worker process travels the path, not the file


@dataclass(frozen=True)
class Split:
    """What was counted while a split was prepared."""

    shape: str  # of its records: text, or one of data.chat.SHAPES
    rows: int
    tokens: int
    learned_tokens: int
    dropped_tokens: int  # of its last, partial row
    documents: int  # texts or conversations that are learned from; a pair is two
    cut_documents: int  # those of them that were longer than a row, and lost what was beyond
    empty_documents: int  # left out: they had no text
    targetless_documents: int  # left out: no token of them would have been learned

    def filled(self, row_tokens: int) -> float:
        """The share of the slots of all rows, each of `row_tokens`, that hold a token."""
        return (self.tokens - self.dropped_tokens) / (self.rows * row_tokens)


@dataclass(frozen=True)
class Data:
    """Training and validation rows, with their counts and a fingerprint (SHA-256) of all their tokens."""

    source: str
    tokenizer: str
    fingerprint: str
    packing: str
    stop_tokens: list[int]  # the special tokens with which documents end, as far as they are learned; at most two
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
    return _open(
        cache / key, train.name, f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens, {name}", options.block_size
    )


def _cache_key(options: Options, tokenizer: PreTrainedTokenizerBase, train: Source, validation: Source | None) -> str:
    """Changes with everything that the rows depend on: content, tokenizer, row length, packing and split."""
    facts = [
        FORMAT,
        train.key,
        validation.key if validation else options.validation_split_percentage,
        options.text_column,
        options.data_format,
        options.max_targetless_share,
        tokenizer.chat_template,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.eos_token_id,
        options.block_size,
        options.packing,
        options.objective,
    ]
    return "rows-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _write(
    scratch: Path, options: Options, tokenizer: PreTrainedTokenizerBase, train: Source, validation: Source | None
) -> None:
    """Prepare both splits into `scratch`/prepared, with what was counted in about.json."""
    percentage = options.validation_split_percentage
    splits = {"train": (train, read_records(train, scratch))}
    if validation:
        splits["validation"] = (validation, read_records(validation, scratch))
    shapes = {source.name: recognise(source, records, options) for source, records in splits.values()}
    if percentage and not validation:
        records = splits["train"][1]
        first = _first_held_out(records, percentage)
        splits["train"] = (train, records.select(range(first)))
        splits["validation"] = (train, records.select(range(first, len(records))))
    digest = hashlib.sha256()
    counts: dict[str, Split] = {}
    stop_tokens: Counter[int] = Counter()
    packing: str | None = options.packing
    for name, (source, records) in splits.items():
        shape = shapes[source.name]
        packing = packing or {"text": "concat", "preference": "pairs"}.get(shape, "documents")
        folder = scratch / "prepared" / name
        folder.mkdir(parents=True)
        encoded = records.map(
            encoder(source, shape, options, tokenizer),
            batched=True,
            with_indices=True,
            num_proc=options.preprocessing_num_workers,
            remove_columns=records.column_names,
            features=ENCODED,
            cache_file_name=str(scratch / f"{name}.arrow"),
            desc=f"Tokenising {name}",
            new_fingerprint=name,  # the default is a hash of the tokenizer object, which is slow and unstable
        )
        lengths, fates, learned_tokens = _write_tokens(encoded, folder, digest, stop_tokens)
        _check_targetless(source, shape, records, fates, options, tokenizer)
        counts[name] = _write_rows(lengths, fates, packing, options, folder, digest, shape, learned_tokens)
        if counts[name].rows == 0:
            raise OptionError(
                f"{source.name}: the {name} split has {counts[name].tokens} tokens, less than one row of block_size "
                f"{options.block_size}\ngive more text, a smaller --block_size or another --validation_split_percentage"
            )
    about = {
        "packing": packing,
        "fingerprint": digest.hexdigest(),
        "stop_tokens": [token for token, _ in stop_tokens.most_common(2) if token in tokenizer.added_tokens_decoder],
        "counts": {name: asdict(split) for name, split in counts.items()},
    }
    (scratch / "prepared" / "about.json").write_text(json.dumps(about, indent=2))


def _first_held_out(documents: datasets.Dataset, percentage: int) -> int:
    """The first row of the last `percentage`, moved on to where a document starts if one still does."""
    first = math.floor(len(documents) * (1 - percentage / 100))
    if "ends" in documents.column_names:
        for row in range(first, len(documents)):
            if row > 0 and documents[row - 1]["ends"]:
                return row
    return first


def _write_tokens(
    encoded: datasets.Dataset, folder: Path, digest: Any, stop_tokens: Counter[int]
) -> tuple[Integers, NDArray[np.uint8], int]:
    """Write tokens.bin. Gives the length and the fate of each record, and how many tokens are learned."""
    lengths, fates, learned_tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)], 0
    with open(folder / "tokens.bin", "wb") as file:
        for batch in encoded.with_format("arrow").iter(batch_size=1000):
            lists = batch["tokens"].combine_chunks()
            tokens = lists.flatten().to_numpy()
            file.write(tokens.tobytes())
            digest.update(tokens.tobytes())
            lengths.append(lists.value_lengths().to_numpy().astype(np.int64))
            fates.append(batch["fate"].to_numpy())
            learned = tokens < GIVEN
            learned_tokens += int(learned.sum())
            starts = np.cumsum(lengths[-1]) - lengths[-1]
            last_learned = np.maximum.reduceat(np.where(learned, np.arange(len(tokens)), 0), starts[lengths[-1] > 0])
            stop_tokens.update(tokens[last_learned[fates[-1][lengths[-1] > 0] == Fate.DOCUMENT]].tolist())
    return np.concatenate(lengths), np.concatenate(fates), learned_tokens


def _check_targetless(
    source: Source,
    shape: str,
    records: datasets.Dataset,
    fates: NDArray[np.uint8],
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raises OptionError with an example, if more than `max_targetless_share` of the records have nothing to learn."""
    # The number of each such record: one that is a pair has two fates, which are the same.
    found = np.unique(np.flatnonzero(fates == Fate.TARGETLESS) * len(records) // len(fates))
    if len(found) > options.max_targetless_share * len(records):
        index = int(found[0])
        place, record = records_of(source, records[index : index + 1], [index])[0]
        raise OptionError(
            f"max_targetless_share {options.max_targetless_share}: {len(found):,} of {len(records):,} records have no "
            f"token to learn within block_size {options.block_size}; give it more, or records with answers\n"
            f"{place}: {readable(place, record, shape, tokenizer)[:500]!r}"
        )


def _write_rows(
    lengths: Integers,
    fates: NDArray[np.uint8],
    packing: str,
    options: Options,
    folder: Path,
    digest: Any,
    shape: str,
    learned_tokens: int,
) -> Split:
    """Write pieces.bin and rows.bin. Gives all that was counted."""
    assert options.block_size
    # The pieces of a large text are one document.
    document = np.cumsum(fates != Fate.PIECE) - (fates != Fate.PIECE)
    packed = pack(packing, np.bincount(document, weights=lengths).astype(np.int64), options.block_size)
    for array, name in ((packed.pieces, "pieces.bin"), (packed.first_pieces, "rows.bin")):
        array.tofile(folder / name)
        digest.update(array.tobytes())
    number = np.bincount(fates, minlength=len(Fate)).tolist()
    return Split(
        shape=shape,
        rows=len(packed.first_pieces) - 1,
        tokens=int(lengths.sum()),
        learned_tokens=learned_tokens,
        dropped_tokens=int(lengths.sum() - (packed.pieces[:, 1] - packed.pieces[:, 0]).sum()),
        documents=number[Fate.DOCUMENT] + number[Fate.CUT],
        cut_documents=number[Fate.CUT],
        empty_documents=number[Fate.EMPTY],
        targetless_documents=number[Fate.TARGETLESS],
    )


def _open(folder: Path, source: str, tokenizer: str, block_size: int | None) -> Data:
    about = json.loads((folder / "about.json").read_text())
    counts = {name: Split(**values) for name, values in about["counts"].items()}
    documents_of = block_size if about["packing"] == "documents" else None
    rows = {name: Rows(folder / name, documents_of) for name in counts}
    return Data(
        source,
        tokenizer,
        about["fingerprint"],
        about["packing"],
        about["stop_tokens"],
        rows["train"],
        rows.get("validation"),
        counts,
    )
