"""Find the data: files, directories, globs and data sets, each with a key that changes with its content."""

import errno
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock
from tqdm import tqdm

from config.demo import demo_files
from config.errors import OptionError
from config.options import Options
from config.plan import mixture_weights
from config.validation import validation_files

SUFFIXES = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")

SETTLED = 2.0  # seconds; a younger change may be followed by another one with the same time stamp


@dataclass(frozen=True)
class Source:
    """What to read: files or a data set, a name for messages, and a key that changes with the content."""

    name: str
    key: str
    files: tuple[Path, ...] = ()
    dataset: datasets.Dataset | datasets.IterableDataset | None = None
    weight: float = 1.0  # in a mixture: its weight in the sequences of an epoch


def find_sources(options: Options) -> tuple[list[Source], dict[str, Source]]:
    """The training sources (several for a mixture), and the source of each validation set. Raises OptionError.

    Files that are new are read once, because the key is a hash of their content.
    """
    if options.dataset_name:
        return _find_dataset(options.dataset_name, options.dataset_config_name, options.streaming)
    cache_dir = cache_directory(options.data_cache_dir)
    sets = validation_files(options.validation_file) if options.validation_file else {}
    held_out = {name: _find_files("validation_file", files, cache_dir) for name, files in sets.items()}
    if options.train_mixture:
        weights = mixture_weights(options.train_mixture)
        found = ((_find_files("train_mixture", name, cache_dir), weight) for name, weight in weights.items())
        return [replace(source, weight=weight) for source, weight in found], held_out
    if options.train_file:
        return [_find_files("train_file", options.train_file, cache_dir, options.streaming)], held_out
    files = demo_files()
    return [Source("the Python standard library", _hash(files), tuple(files))], {}


def cache_directory(data_cache_dir: str) -> Path:
    """The directory `data_cache_dir`, created if it does not exist. Raises OptionError."""
    cache = Path(data_cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror}; pass a writable directory") from error
    return cache


def _find_files(option: str, value: str, cache_dir: Path, streaming: bool = False) -> Source:
    """The source of `value`: a file, a directory, a glob, or several of them separated by commas. Raises OptionError.

    The key of a streamed source covers only the names, sizes and times of its files.
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
            raise OptionError(f"{option} {file}: pass {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files")
    try:
        key = _statuses(files) if streaming else _hash_once(files, cache_dir)
        empty = all(file.stat().st_size == 0 for file in files)
    except OSError as error:
        raise OptionError(f"{option} {error.filename or value}: {error.strerror}; pass a readable file") from error
    if empty:
        raise OptionError(f"{option} {value}: the file is empty; pass one that holds text")
    return Source(f"{option} {value}", key, tuple(files))


def _find_dataset(name: str, config_name: str | None, streaming: bool) -> tuple[list[Source], dict[str, Source]]:
    """The splits train and validation of a data set. The second may not exist."""
    try:
        splits = datasets.load_dataset(name, config_name, streaming=streaming)
    except Exception as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise OptionError(f"dataset_name {name}: cannot be loaded: {cause}\npass a hub id or a directory") from error
    if "train" not in splits:
        raise OptionError(f"dataset_name {name}: has no split named train, only {', '.join(splits)}")
    train, validation = (
        Source(
            f"dataset_name {name} ({split})",
            f"{name} {config_name}" if streaming else str(splits[split]._fingerprint),
            dataset=splits[split],
        )
        if split in splits
        else None
        for split in ("train", "validation")
    )
    assert train
    return [train], {"eval": validation} if validation else {}


def _hash_once(files: list[Path], cache_dir: Path) -> str:
    """SHA-256 over the contents of files. A file with the status of an earlier call is not read again.

    The status is device, inode, size and both times. The system sets ctime at every change, and no program can set it
    back. A file that changed a moment ago is not remembered, because its next change might get the same time.
    """
    path = cache_dir / "hashes.json"
    with FileLock(cache_dir / "hashes.lock"):
        known: dict[str, Any] = {}
        with suppress(FileNotFoundError, ValueError):
            known = json.loads(path.read_text())
        hashes = []
        for file in tqdm(files, "Hashing files", unit="file", delay=1, disable=None):
            now, status = time.time(), file.stat()
            facts = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            before, content = known.get(str(file.resolve()), (None, ""))
            if before != facts:
                content = _hash([file])
                if now - status.st_ctime > SETTLED:
                    known[str(file.resolve())] = facts, content
            hashes.append(content)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, path)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _statuses(files: list[Path]) -> str:
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _hash(files: list[Path]) -> str:
    """SHA-256 over the suffixes and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.suffix} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()
