"""Find the data: files, directories, globs and data sets, each with a key that changes with its content."""

import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config.demo import demo_files
from config.errors import OptionError, naming, other_place
from config.options import Options
from config.plan import mixture_weights
from config.text import load_json
from config.validation import validation_files
from data.dataset_info import FILE_NAME, Entry, read_entries
from data.files.bounded import COMPRESSIONS
from data.files.remote import File, Remote, find_remote, is_url
from data.records import READERS, SOURCE_SUFFIXES, Source, file_format, parsed, read, size_of_file, status_of
from runtime import locked
from runtime.files import replace_text, require_readable, require_trusted

DATA_SUFFIXES = tuple(
    suffix + compression
    for suffix in READERS
    if suffix not in SOURCE_SUFFIXES
    for compression in ("", *(COMPRESSIONS if suffix not in (".txt", ".parquet") else ()))
)
SUFFIXES = (*DATA_SUFFIXES, *SOURCE_SUFFIXES)

FORMATS = f"{', '.join(suffix for suffix in READERS if suffix not in SOURCE_SUFFIXES)}, or source files (.py, .md, ...)"

SETTLED = 2.0  # seconds; a file that changed less than this ago is hashed again next time
SETTLED_ELSEWHERE = 3600.0  # the same for a file system with another clock than the cache

NOT_DATA = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "model.safetensors.index.json", "preprocessor_config.json", "merges.txt"),
    *("adapter_config.json", "trainer_state.json", "trainer_log.jsonl", "train_results.json", "eval_results.json"),
    *("all_results.json", "metrics.jsonl", FILE_NAME, "dataset_infos.json", "dataset_dict.json", "state.json"),
    "configuration.json",  # of ModelScope
}

"""Files that other programs and trainers write. They are read only if they are named, not as a part of a directory."""

NOT_FOR_TRAINING = re.compile(r"(?:^|[^a-z])(test|valid|validation|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)

SAVED = ("state.json", "dataset_dict.json")  # either is in a directory that save_to_disk of `datasets` wrote


def find_sources(options: Options) -> tuple[list[Source], dict[str, Source]]:
    """The training sources (several for a mixture), and the source of each validation set. Raises OptionError.

    Files that are new are read once, because the key is a hash of their content.
    """
    if options.dataset_name:
        return _find_dataset(options.dataset_name, options)
    sets = validation_files(options.validation_file) if options.validation_file else {}
    held_out = {name: _find_files("validation_file", files, options) for name, files in sets.items()}
    if options.train_mixture:
        weights = mixture_weights(options.train_mixture)
        found = (
            (_find_files("train_mixture", name, options, options.streaming), weight) for name, weight in weights.items()
        )
        sources = [replace(source, weight=weight) for source, weight in found]
    elif options.train_file:
        sources = [_find_files("train_file", options.train_file, options, options.streaming)]
    elif options.dataset:
        entries = read_entries(options.dataset_info or "data", options.dataset)
        sources = [_find_entry(entry, options) for entry in entries]
    elif held_out and options.evaluates_only:
        return list(held_out.values())[:1], held_out  # nothing is trained on, so any data may be in its place
    else:
        files = demo_files()
        return [Source("the Python standard library", _hash(files), tuple(files))], {}
    _report_twice(sources, held_out)
    return sources, held_out


def cache_directory(data_cache_dir: str) -> Path:
    """The directory `data_cache_dir`, created for this user alone if it does not exist. Raises OptionError.

    Data that others can change decides what is trained on: who they are is said once, or refused if they are all users.
    """
    cache = Path(data_cache_dir).expanduser()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror}; pass a writable directory") from error
    require_trusted(cache, cache)
    return cache


def _say(message: str) -> None:
    """Print a line about the data, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def _find_files(option: str, value: str, options: Options, streaming: bool = False) -> Source:
    """The source of `value`: a file, a directory, a glob, or several of them separated by commas. Raises OptionError.

    The key of a streamed source covers only the names, sizes and times of its files.
    """
    with naming(option, value):
        return _find_readable_files(option, value, options, streaming)


def _find_readable_files(option: str, value: str, options: Options, streaming: bool) -> Source:
    files: list[File] = []
    for name in [value] if Path(value).expanduser().exists() else value.split(","):
        if is_url(name):
            files += _find_remote_files(option, name)
            continue
        path = Path(name).expanduser()
        if not path.is_dir() and not {"*", "?"} & set(name):
            files.append(path)
            continue
        if path.is_dir() and any((path / saved).exists() for saved in SAVED):
            raise OptionError(f"{option} {name}: was written by save_to_disk of datasets; pass --dataset_name {name}")
        found, left_out = _choose(path, _walk(path) if path.is_dir() else _match(path), options)
        if not found:
            there = f"no file there has one of the suffixes {FORMATS}"
            raise OptionError(f"{option} {name}: {there}{_listed('; left out: ', left_out)}")
        if left_out:
            _say(f"{option} {name}: reads {len(found)} files and leaves out {_listed('', left_out)}")
        others = [file.name for file in found if NOT_FOR_TRAINING.search(file.name)]
        if others and option != "validation_file" and len(others) < len(found):
            _say(f"{option} {name}: trains on {_listed('', others)}, too; move files that are not for training")
        files += found
    for each in files:
        if not each.name.lower().endswith(SUFFIXES):
            raise OptionError(f"{option} {each}: pass {FORMATS} files; lines and tables may end in .gz or .zst")
    local = [file for file in files if isinstance(file, Path)]
    try:
        for file in local:
            if file.exists() and not file.is_file():
                raise OptionError(f"{option} {file}: is a pipe or a device\nwrite its content to a file, and pass that")
            require_readable(option, file)
        statuses = {file: ("", *astuple(file)) if isinstance(file, Remote) else status_of(file) for file in files}
        key = _statuses(files) if streaming else _hash_once(local, cache_directory(options.data_cache_dir))
        empty = all(size_of_file(file) == 0 for file in files)
    except OSError as error:
        raise OptionError(f"{option} {error.filename or value}: {error.strerror}; pass a readable file") from error
    if empty:
        raise OptionError(f"{option} {value}: the file is empty; pass one that holds text")
    name = f"{option} {value}"
    return Source(name, key, tuple(files), max_record_bytes=options.max_record_bytes, statuses=statuses)


def _find_remote_files(option: str, url: str) -> list[Remote]:
    """The file at a URL, or the files of data of a directory there, or all that match a pattern. Raises OptionError."""
    found = find_remote(option, url)
    if "*" in url or [file.url for file in found] == [url]:
        return found
    hidden = re.compile(r"/[._][^/]*")  # also the directories of other programs, such as _temporary
    data = [
        file
        for file in found
        if file.name.lower().endswith(DATA_SUFFIXES)
        and file.name not in NOT_DATA
        and not hidden.search(file.url.removeprefix(url.rstrip("/")))
    ]
    if left_out := [file.name for file in found if file not in data]:
        _say(f"{option} {url}: reads {len(data)} files and leaves out {_listed('', left_out)}")
    if not data:
        raise OptionError(f"{option} {url}: no file there has one of the suffixes {FORMATS}; pass a file or a pattern")
    return data


def _walk(directory: Path) -> Iterator[Path]:
    """The files below a directory, also those of directories that symbolic links point to."""
    seen = set()
    for folder, folders, names in os.walk(directory, followlinks=True, onerror=_raise):
        if (place := os.path.realpath(folder)) in seen:
            folders.clear()  # a link to a directory that was read already, perhaps to one above it
            continue
        seen.add(place)
        yield from (Path(folder, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _match(pattern: Path) -> Iterator[Path]:
    """The files that match. Raises PermissionError for a directory that must be searched: `glob` leaves it out."""
    root = Path(pattern.anchor)
    parts = pattern.relative_to(root).parts
    for number, part in enumerate(parts):
        if {"*", "?"} & set(part):
            for directory in root.glob("/".join(parts[:number])) if number else [root]:
                if directory.is_dir() and not os.access(directory, os.R_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
    return (path for path in root.glob("/".join(parts)) if not path.is_dir())


def _choose(origin: Path, paths: Iterable[Path], options: Options) -> tuple[list[Path], list[str]]:
    """The data files among the files of a directory or glob, in order, and the names of the others.

    Hidden files, files that other programs write, checkpoints and the directories of this run are no data. In a
    directory, a file must have a suffix of data. Source files are data in a directory without such files, because next
    to them they describe the data or read it. A glob asks for every file that it matches.
    """
    pattern = [] if origin.is_dir() else [part for part in origin.parts if {"*", "?"} & set(part)]
    root = Path(*origin.parts[: origin.parts.index(pattern[0])]) if pattern else origin
    ours = [Path(name).expanduser().resolve() for name in (options.output_dir, options.data_cache_dir)]
    ours = [directory for directory in ours if root.resolve() in directory.parents]
    found, source_files, left_out = [], [], []
    for path in sorted(paths):
        inside = path.absolute().relative_to(root.absolute())
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in inside.parts)
        hidden = hidden and not any(part.startswith(".") for part in pattern)
        of_run = any(directory in path.resolve().parents for directory in ours)
        of_run = of_run or any(re.fullmatch(r"checkpoint-\d+", part) for part in inside.parts)
        if hidden or of_run or path.name in NOT_DATA:
            left_out.append(str(inside))
        elif pattern or path.name.lower().endswith(DATA_SUFFIXES):
            found.append(path)
        elif path.name.lower().endswith(SOURCE_SUFFIXES):
            source_files.append(path)
        else:
            left_out.append(str(inside))
    if not found:
        return source_files, left_out
    return found, sorted([*left_out, *(str(path.absolute().relative_to(root.absolute())) for path in source_files)])


def _listed(opening: str, names: list[str]) -> str:
    """The number of names and the first three of them, or nothing if there are none."""
    more = ", ..." if len(names) > 3 else ""
    return f"{opening}{len(names)} ({', '.join(names[:3])}{more})" if names else ""


def _report_twice(sources: list[Source], held_out: dict[str, Source]) -> None:
    """Say which files are read twice: by two names, or for training and for validation."""
    seen: set[tuple[object, ...]] = set()
    for source in [*sources, *held_out.values()]:
        again = []
        for file in source.files:
            identity = source.statuses[file][:2]
            again += [file.name] if identity in seen else []
            seen.add(identity)
        if again:
            what = "is training data, too" if source in held_out.values() else "is read twice"
            _say(f"{source.name}: {_listed('', again)} {what}; name each file once if that is not meant")


def _find_entry(entry: Entry, options: Options) -> Source:
    """The source that an entry of dataset_info.json describes."""
    if entry.num_samples and options.streaming:
        raise OptionError(f"dataset {entry.name}: num_samples cannot be combined with streaming\nremove one of them")
    if entry.path:
        if not Path(entry.path).exists():
            raise OptionError(f"dataset {entry.name}: file_name {entry.path} does not exist; correct {FILE_NAME}")
        source = _find_files("dataset", entry.path, options, options.streaming)
    else:
        splits = _load_dataset("dataset", str(entry.hub_id), entry.subset, options.streaming)
        if entry.split not in splits:
            raise OptionError(f"dataset {entry.name}: has no split {entry.split}, only {', '.join(splits)}")
        source = _of_split(f"dataset {entry.name}", splits, entry.split, f"{entry.hub_id} {entry.subset}", options)
    first = next(read(source), None)
    columns = parsed(first) if first else {}
    if unused := [name for name in columns if name not in entry.columns.values()]:
        _say(f"dataset {entry.name}: {FILE_NAME} names no use for the columns {', '.join(unused)}")
    if missing := [name for name in entry.columns.values() if name not in columns]:
        _say(f"dataset {entry.name}: the first record has no {', '.join(missing)}, which {FILE_NAME} names")
    if entry.num_samples:
        _say(f"dataset {entry.name}: reads the first {entry.num_samples} records, where LLaMA-Factory draws them")
    return replace(source, key=f"{source.key} {entry.key()}", entry=entry, weight=None)


def _find_dataset(name: str, options: Options) -> tuple[list[Source], dict[str, Source]]:
    """The splits train and validation of a data set. The second may not exist."""
    splits = _load_dataset("dataset_name", name, options.dataset_config_name, options.streaming)
    if "train" not in splits:
        raise OptionError(
            f"dataset_name {name}: has no split named train, only {', '.join(splits)}\nrename a split, or pass its "
            "files by --train_file"
        )
    if others := [split for split in splits if split not in ("train", "validation")]:
        missing = "" if "validation" in splits else "; no split is named validation"
        _say(f"dataset_name {name}: does not use {_listed('', others)}{missing}")
    train, validation = (
        _of_split(f"dataset_name {name} ({split})", splits, split, f"{name} {options.dataset_config_name}", options)
        if split in splits
        else None
        for split in ("train", "validation")
    )
    assert train
    return [train], {"eval": validation} if validation else {}


def _of_split(name: str, splits: Any, split: str, key: str, options: Options) -> Source:
    """The source of one split. A data set that is not on this machine has only its name as key."""
    import datasets  # only here and below: with pandas, it takes half a second, and most runs read files

    dataset = splits[split]
    content = isinstance(dataset, datasets.Dataset)
    key = str(dataset._fingerprint) if content else key
    return Source(name, key, dataset=dataset, max_record_bytes=options.max_record_bytes)


def _load_dataset(option: str, name: str, config_name: str | None, streaming: bool) -> Any:
    """The splits of a data set on the hub or in a directory, which save_to_disk may have written."""
    import datasets

    path = Path(name).expanduser()
    if path.is_file():
        raise OptionError(f"{option} {name}: is a file; pass --train_file {name}")
    try:
        if any((path / saved).exists() for saved in SAVED):
            saved_set = datasets.load_from_disk(str(path))
            return {"train": saved_set} if isinstance(saved_set, datasets.Dataset) else saved_set
        return datasets.load_dataset(str(path) if path.is_dir() else name, config_name, streaming=streaming)
    except Exception as error:
        cause: BaseException = error  # `datasets` says little in its own message
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__:
            cause = cause.__cause__
        lines = " ".join(str(cause).split())[:400] or type(cause).__name__
        remedy = _other_columns(path) or "pass a hub id or a directory"
        raise OptionError(f"{option} {name}: cannot be loaded: {lines}\n{remedy}") from error


def _other_columns(directory: Path) -> str:
    """Names the first file of a directory that has other columns than the first one, if there is one, and a remedy."""
    columns: dict[Path, list[str]] = {}
    for file in sorted(_walk(directory)) if directory.is_dir() else ():
        with suppress(OptionError, KeyError):
            first = next(read(Source("", "", (file,))), None)
            columns |= {file: sorted(parsed(first))} if first else {}
    for file, names in columns.items():
        first_file, first_names = next(iter(columns.items()))
        if names != first_names:
            return (
                f"{file} has the columns {', '.join(names)}, and {first_file.name} has {', '.join(first_names)}\n"
                f"give all files one set of columns, or pass --train_file {directory}"
            )
    return ""


def _hash_once(files: list[Path], cache_dir: Path) -> str:
    """SHA-256 over the contents of files. A file with the status of an earlier call is not read again.

    The status is device, inode, size and both times. The system sets ctime at every change, and no program can set it
    back. A file that changed a moment ago is not remembered, because its next change might get the same time. Its times
    are of the clock of its file system, which may be a server's. That clock is known only if the cache is on it, too.
    """
    path = cache_dir / "hashes.json"
    if path.exists():
        require_trusted(path, cache_dir)
    with ExitStack() as lock:
        with _writing(cache_dir):
            lock.enter_context(locked(cache_dir / "hashes.lock"))
        known: dict[str, Any] = {}
        with (
            _writing(cache_dir),
            suppress(FileNotFoundError, ValueError, TypeError, AttributeError),
        ):  # a damaged file counts as none
            known = {name: (facts, str(content)) for name, (facts, content) in load_json(path.read_bytes()).items()}
        hashes = []
        with _writing(cache_dir):
            os.utime(cache_dir / "hashes.lock")  # sets the time of the clock of this file system
            clock = (cache_dir / "hashes.lock").stat()
        now, device = min(clock.st_mtime, time.time()), clock.st_dev
        for file in tqdm(files, "Hashing files", unit="file", delay=1, disable=None):
            status = file.stat()
            facts = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            before, content = known.get(str(file.resolve()), ([], ""))
            if before != facts:
                content = _hash([file])
                if now - status.st_ctime > (SETTLED if status.st_dev == device else SETTLED_ELSEWHERE):
                    known[str(file.resolve())] = facts, content
            hashes.append(content)
        with _writing(cache_dir):
            replace_text(path, json.dumps(known))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    """Raise OptionError for an OSError of the block, which writes to the cache: it is no error of a training file."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"data_cache_dir {cache_dir}: {error.strerror or error}; pass {other_place(error)}"
        ) from error


def _statuses(files: list[File]) -> str:
    facts = [
        astuple(file) if isinstance(file, Remote) else (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _hash(files: list[Path]) -> str:
    """SHA-256 over the suffixes and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # that of a read does not name its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        digest.update(f"{file_format(path)} {content}".encode())
    return digest.hexdigest()
