"""Documents: the user's files or data set, or the source text of the running interpreter's standard library."""

import errno
import hashlib
import io
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow
from filelock import FileLock
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import config
from config import OptionError, Options

EMBEDDED_VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
PIECE = 16_384  # characters; a .txt file is read in pieces, so that its size does not bound memory
CHUNK = 1 << 20  # bytes of records that are tokenised together, by one process
SETTLED = 2.0  # seconds; a file that has changed this recently may change again without another time stamp

Position = tuple[int, int, int]
"""Where a record begins: the number of its file, the byte there before decompression (of .parquet: the row), and the
number of records before it in that file."""
START: Position = (0, 0, 0)


@dataclass(frozen=True)
class Source:
    """Where documents come from: what names it in messages, and a key that changes when its content does."""

    name: str
    key: str
    files: tuple[Path, ...] = ()
    dataset: datasets.Dataset | datasets.IterableDataset | None = None
    weight: float = 1.0  # in a mixture: the share of the rows of an epoch


class Raw(NamedTuple):
    """A record as it was read, and not yet understood."""

    place: str  # where a person finds it
    content: bytes | dict[str, Any]  # a line of JSON, or columns
    after: Position  # where the next one begins
    begins: bool = True  # a text that is read in pieces begins with the first
    ends: bool = True  # and ends with the last


def find_sources(options: Options) -> tuple[list[Source], Source | None]:
    """The training sources, several for a mixture, and the validation source where one is given. Raises OptionError.

    Costs a pass over files that have not been seen before: their content is hashed.
    """
    if options.dataset_name:
        return _find_dataset(options)
    cache_dir = cache_directory(options)
    validation = options.validation_file
    held_out = _find_files("validation_file", validation, cache_dir) if validation else None
    if options.train_mixture:
        weights = config.mixture(options.train_mixture)
        found = ((_find_files("train_mixture", name, cache_dir), weight) for name, weight in weights.items())
        return [replace(source, weight=weight) for source, weight in found], held_out
    if options.train_file:
        return [_find_files("train_file", options.train_file, cache_dir, options.streaming)], held_out
    files = _embedded_files()
    return [Source("the Python standard library", _hash(files), tuple(files))], None


def cache_directory(options: Options) -> Path:
    """`data_cache_dir`, made if need be. Raises OptionError."""
    cache = Path(options.data_cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror}; give a directory that can be written") from error
    return cache


def read(source: Source, start: Position = START) -> Iterator[Raw]:
    """The records of a source from `start` on, in the order of its files. Holds one at a time, or one batch of rows.

    A line of a .jsonl file is not parsed here, where one process reads for all that tokenise. A .txt file is one
    document, in records {"text": str} of a piece of it each. Other records have the columns of their file or data set.
    Starting within a compressed file costs reading it up to there. Raises OptionError for a file that cannot be read.
    """
    if source.dataset is not None:
        for row, record in enumerate(source.dataset.skip(start[1]), start[1]):
            yield Raw(f"{source.name}: row {row}", record, (0, row + 1, row + 1))
        return
    for number in range(start[0], len(source.files)):
        path = source.files[number]
        read_file = {".parquet": _read_rows, ".txt": _read_pieces, ".py": _read_pieces}.get(path.suffix, _read_lines)
        try:
            yield from read_file(path, start if number == start[0] else (number, 0, 0))
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise OptionError(f"{path}: cannot be read as {path.suffix}: {cause}") from error


def chunks(records: Iterator[Raw], bytes_each: int) -> Iterator[list[Raw]]:
    """The same records in lists of about `bytes_each`. Where a list ends depends on its own records alone."""
    chunk: list[Raw] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += size_of(record)
        if size >= bytes_each:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def size_of(record: Raw) -> int:
    """Its bytes as they were read; of columns, the characters that they would have in Python."""
    return len(record.content) if isinstance(record.content, bytes) else len(repr(record.content))


def embedded_tokenizer(cache_dir: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens, trained once on the embedded corpus and kept in `cache_dir`.

    Any number of processes may call at once: the first one trains, the others wait for its lock.
    """
    files = _embedded_files()
    cached = cache_dir / f"tokenizer-{_hash(files)[:16]}-{EMBEDDED_VOCABULARY}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        if not (cached / "complete").exists():
            bpe = Tokenizer(models.BPE())
            bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=EMBEDDED_VOCABULARY,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            pieces = (piece.content for file in files for piece in _read_pieces(file, START))
            bpe.train_from_iterator((piece["text"] for piece in pieces if isinstance(piece, dict)), trainer)
            PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT).save_pretrained(cached)
            (cached / "complete").touch()
        return PreTrainedTokenizerFast.from_pretrained(cached)


def _find_files(option: str, value: str, cache_dir: Path, streaming: bool = False) -> Source:
    """The source of `value`: a file, a directory, a glob, or several with commas between. Raises OptionError.

    The key of one that is streamed says only which names, sizes and times its files have.
    """
    files: list[Path] = []
    for name in [value] if Path(value).exists() else value.split(","):
        path = Path(name).expanduser()
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES)]
        elif "*" in name or "?" in name:
            root = Path(path.anchor)
            found = [file for file in root.glob(str(path.relative_to(root))) if file.is_file()]
        else:
            found = [path]
        files += sorted(found)
        if not found:
            raise OptionError(f"{option} {name}: no file there has one of the suffixes {', '.join(SUFFIXES)}")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise OptionError(f"{option} {file}: give {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files")
    try:
        key = _statuses(files) if streaming else _hash_once(files, cache_dir)
        empty = all(file.stat().st_size == 0 for file in files)
    except OSError as error:
        raise OptionError(f"{option} {error.filename or value}: {error.strerror}; give a readable file") from error
    if empty:
        raise OptionError(f"{option} {value}: the file is empty; give one that holds text")
    return Source(f"{option} {value}", key, tuple(files))


def _find_dataset(options: Options) -> tuple[list[Source], Source | None]:
    """The splits of a data set; its `validation` split is used where there is one."""
    name = options.dataset_name
    assert name
    try:
        splits = datasets.load_dataset(name, options.dataset_config_name, streaming=options.streaming)
    except Exception as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise OptionError(f"dataset_name {name}: cannot be loaded: {cause}\ngive a hub id or a directory") from error
    if "train" not in splits:
        raise OptionError(f"dataset_name {name}: has no split named train, only {', '.join(splits)}")
    train, validation = (
        Source(f"dataset_name {name} ({split})", _dataset_key(name, options, splits[split]), dataset=splits[split])
        if split in splits
        else None
        for split in ("train", "validation")
    )
    assert train
    return [train], validation


def _dataset_key(name: str, options: Options, dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    return f"{name} {options.dataset_config_name}" if options.streaming else str(dataset._fingerprint)


def _embedded_files() -> list[Path]:
    """The modules of the standard library without its tests, in an order that is random and always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())


def _read_pieces(path: Path, start: Position) -> Iterator[Raw]:
    """One document, in pieces of about PIECE characters that together are its exact text.

    A piece ends where a line ends and the next one starts with a character that is no white space: pre-tokenizers
    split there anyway, so that the tokens are those of the whole text.
    """
    number, offset, records = start
    if records and offset == path.stat().st_size:
        return
    piece: list[str] = []
    size, begins = 0, offset == 0
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            text = line.decode(errors="replace")
            if size >= PIECE and not text[0].isspace():
                records += 1
                yield Raw(str(path), {"text": "".join(piece)}, (number, offset, records), begins, False)
                piece, size, begins = [], 0, False
            piece.append(text)
            size += len(text)
            offset += len(line)
    yield Raw(str(path), {"text": "".join(piece)}, (number, offset, records + 1), begins, True)


def _read_lines(path: Path, start: Position) -> Iterator[Raw]:
    number, offset, lines = start
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with open(path, "rb") if compression is None else _decompressed(path, compression) as file:
        if compression is None:
            file.seek(offset)
        else:
            for size in [CHUNK] * (offset // CHUNK) + [offset % CHUNK]:
                file.read(size)
        for line in file:
            offset, lines = offset + len(line), lines + 1
            if line.strip():
                yield Raw(f"{path}: line {lines}", line, (number, offset, lines))


def _decompressed(path: Path, compression: str) -> IO[bytes]:
    """pyarrow, which `datasets` needs in any case, reads both kinds; Python itself knows zstd from 3.14 on."""
    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression=compression)), CHUNK)


def _read_rows(path: Path, start: Position) -> Iterator[Raw]:
    """Rows of a .parquet file, from the row group on that holds the first one."""
    number, _, first = start
    with parquet.ParquetFile(path) as file:
        ends = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
        group = int(np.searchsorted(ends, first, side="right")) - 1
        row = int(ends[group])
        for batch in file.iter_batches(batch_size=100, row_groups=list(range(group, file.num_row_groups))):
            for record in batch.to_pylist():
                row += 1
                if row > first:
                    yield Raw(f"{path}: row {row - 1}", record, (number, row, row))


def _hash_once(files: list[Path], cache_dir: Path) -> str:
    """SHA-256 over the contents of files. One whose status is that of an earlier call is not read again.

    Its status: device, inode, size and both times. The system sets ctime at every change, and no program can set it
    back; a file that changed a moment ago is not remembered, because its next change might get the same time.
    """
    path = cache_dir / "hashes.json"
    with FileLock(cache_dir / "hashes.lock"):
        known: dict[str, Any] = {}
        with suppress(FileNotFoundError, ValueError):
            known = json.loads(path.read_text())
        hashes = []
        for file in tqdm(files, "Hashing files", unit="file", delay=1):
            now, status = time.time(), file.stat()
            facts = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            before, content = known.get(str(file.resolve()), (None, ""))
            if before != facts:
                content = _hash([file])
                if now - status.st_ctime > SETTLED:
                    known[str(file.resolve())] = facts, content
            hashes.append(content)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(known))
        os.replace(beside, path)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _statuses(files: list[Path]) -> str:
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _hash(files: list[Path]) -> str:
    """SHA-256 over the kinds and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.suffix} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()
