"""The cache of prepared data: a folder in `data_cache_dir` for each source and each way to prepare it.

One process reads, and others tokenize: one for each core by default. Results are written in the order of the text, so
they do not depend on the number of processes. Each process holds a few chunks of text, whatever the size of the files.
An interrupted preparation resumes where it stopped. A start that finds a damaged file prepares the data again.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from config.errors import OptionError, other_place
from data.files.bounded import COMPRESSIONS
from data.files.checked import VERIFIED_AT_START, CheckedWriter, Content, DamagedError, read_checked, write_checked
from data.packing import Packing, pack_in_parts
from data.records import CHUNK, START, Position, RawRecord, Source, chunks, parsed, read, size_of, size_of_file
from data.sequences import Split, open_prepared
from data.tokens import MASKED, Encoded, Had, Outcome, Rendering, can_stop, document_lengths, encoder, readable
from runtime import ignore_signals, locked
from runtime.files import require_trusted

FORMAT = 7  # raise it when the files of an older version can no longer be read

RECORD = np.dtype([("tokens", "<i8"), ("trained_on", "<i8"), ("last_trained", "<u4"), ("outcome", "u1"), ("had", "u1")])

SYNC = 1.0  # seconds between two records of the progress, so an interrupted preparation loses no more

ABANDONED = 7 * 24 * 3600  # the seconds after which an interrupted preparation is removed

Records = NDArray[np.void]  # of RECORD: the counts of each record

Tokenized = tuple[
    NDArray[np.uint32], Records, Counter[str]
]  # with the columns that are not used, and in how many records


@dataclass(frozen=True)
class Prepared:
    """A prepared source: its folder, and the content of about.json."""

    folder: Path
    fingerprint: str
    packing: str
    stop_tokens: list[int]
    unused: dict[str, int]  # columns that hold something but are not used, and in how many records
    counts: dict[str, Split]


class Done(NamedTuple):
    """The progress of a preparation: what is written, what was read for it and not used, and where to read on."""

    tokens: int
    records: int
    bytes: int
    after: Position
    unused: dict[str, int]


def prepare_source(
    source: Source, rendering: Rendering, packing: Packing, percentage: int, cache: Path, workers: int | None
) -> Prepared:
    """A prepared source, from the folder `cache` or made now by `workers` processes. Raises OptionError.

    The last `percentage` of its records become the validation split. A file lock lets one process prepare while the
    others wait.
    """
    key = cache_key(source, rendering, packing, percentage)
    partial, folder = cache / f"{key}.partial", cache / key
    with suppress(DamagedError, FileNotFoundError):  # another process may remove what is damaged
        return _verified(folder)  # the usual case, without the lock, so that the ranks verify at the same time
    try:
        with locked(cache / f"{key}.lock"):
            try:
                return _verified(folder)  # another process has prepared it meanwhile
            except DamagedError as error:
                if folder.exists():
                    print(f"{error}\nprepared data was damaged; it is prepared again", file=sys.stderr)
                    shutil.rmtree(folder)
            _remove_abandoned(cache)
            if partial.exists():
                require_trusted(partial, cache)
            partial.mkdir(exist_ok=True)
            try:
                _write(partial, source, rendering, packing, percentage, workers)
            except OptionError:
                shutil.rmtree(partial)  # a changed file or option will have another key
                raise
            partial.rename(folder)
            return _verified(folder)
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror or error}; pass {other_place(error)}") from error


def _verified(folder: Path) -> Prepared:
    """The prepared source in `folder`. Raises DamagedError if a file is not the one that was written.

    Larger files than VERIFIED_AT_START are verified only where a sequence is read. Raises OptionError if the folder
    belongs to a user who is not trusted.
    """
    if folder.exists():
        require_trusted(folder, folder.parent)
    about = read_checked(folder / "about.json")
    if about.pop("key") != folder.name:
        raise DamagedError(f"{folder / 'about.json'}: is of other data")
    counts = {name: Split(**values) for name, values in about.pop("counts").items()}
    for name in counts:
        for array in open_prepared(folder, name):
            if array.content.bytes <= VERIFIED_AT_START:
                array.verify()
    del about["files"]
    return Prepared(folder, counts=counts, **about)


def cache_key(source: Source, rendering: Rendering, packing: Packing, percentage: int) -> str:
    """The name of the folder of a prepared source. It changes with everything that the sequences depend on."""
    facts = [FORMAT, source.key, rendering.key(), packing.key(), percentage]
    return "data-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _remove_abandoned(cache: Path) -> None:
    """Remove old interrupted preparations, which no process has resumed."""
    for partial in cache.glob("data-*.partial"):
        with suppress(Timeout, FileNotFoundError), FileLock(partial.with_suffix(".lock"), timeout=0):
            if max(path.stat().st_mtime for path in [partial, *partial.iterdir()]) < time.time() - ABANDONED:
                shutil.rmtree(partial)


def _write(
    folder: Path, source: Source, rendering: Rendering, packing: Packing, percentage: int, workers: int | None
) -> None:
    """Write tokens, sequences, counts and about.json of a source into `folder`."""
    unused, tokens = _write_tokens(folder, source, encoder(rendering), workers)
    records: Records = np.fromfile(folder / "records.bin", RECORD)
    each = 2 if rendering.shape == "preference" else 1  # entries of records.bin for each record of the source
    outcomes = records["outcome"][::each]  # of a pair, both are left out or none
    _check_targetless(source, outcomes, rendering)
    first = _first_held_out(outcomes, percentage) * each
    splits = {"train": slice(0, first), "validation": slice(first, None)} if percentage else {"train": slice(None)}
    written, counts = {"tokens.bin": tokens}, {}
    for name, part in splits.items():
        counts[name], segments, sequences = _write_sequences(
            folder / name, source, rendering.shape, packing, records, part
        )
        written |= {f"{name}/segments.bin": segments, f"{name}/sequences.bin": sequences}
    digest = hashlib.sha256(b"".join(bytes.fromhex(content.sha256) for content in written.values()))
    stop_tokens = Counter(records["last_trained"][records["outcome"] == Outcome.DOCUMENT].tolist()).most_common(2)
    about = {
        "key": folder.name.removesuffix(".partial"),
        "fingerprint": digest.hexdigest(),
        "packing": packing.kind,
        "stop_tokens": [token for token, _ in stop_tokens if can_stop(rendering.tokenizer, token)],
        "unused": unused,
        "counts": {name: asdict(split) for name, split in counts.items()},
        "files": {name: asdict(content) for name, content in written.items()},
    }
    write_checked(folder / "about.json", about)
    (folder / "progress.json").unlink(missing_ok=True)


def _write_tokens(
    folder: Path, source: Source, encode: Callable[[list[RawRecord]], Encoded], workers: int | None
) -> tuple[dict[str, int], Content]:
    """Write tokens.bin and records.bin. Returns the columns not used, and the content of tokens.bin.

    If progress.json exists, resume there.
    """
    done, tokens_file, records_file = _resume(folder)
    plain = not any(path.suffix.lower() in (".parquet", *COMPRESSIONS) for path in source.files)
    size = sum(map(size_of_file, source.files)) if plain else 0  # of the text; 0 if unknown
    bar = tqdm(
        desc=f"Tokenizing {source.name}",
        total=size or None,
        initial=done.bytes,
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
    )
    saved = time.monotonic()
    files = {"tokens.bin": tokens_file, "records.bin": records_file}
    with bar:
        for (tokens, records, unused), size, after in _tokenized(
            chunks(read(source, done.after), CHUNK), encode, workers
        ):
            tokens_file.write(tokens.tobytes())
            records_file.write(records.tobytes())
            done = Done(
                done.tokens + len(tokens),
                done.records + len(records),
                done.bytes + size,
                after,
                Counter(done.unused) + unused,
            )
            bar.update(size)
            if time.monotonic() - saved >= SYNC:
                for file in files.values():
                    file.sync()
                hashes = {name: file.sha256() for name, file in files.items()}
                write_checked(folder / "progress.json", {"done": done, "sha256": hashes})
                saved = time.monotonic()
    records_file.close()
    return done.unused, tokens_file.close()


def _resume(folder: Path) -> tuple[Done, CheckedWriter, CheckedWriter]:
    """The progress of an interrupted preparation, and its two files. The start if there is none, or it is damaged."""
    tokens, records = folder / "tokens.bin", folder / "records.bin"
    if (folder / "progress.json").exists():
        try:
            progress = read_checked(folder / "progress.json")
            done = Done(*progress["done"])
            files = CheckedWriter(tokens, done.tokens * 4), CheckedWriter(records, done.records * RECORD.itemsize)
            for file in files:
                if file.sha256() != progress["sha256"][file.path.name]:
                    raise DamagedError(f"{file.path}: its bytes are not those that were written")
            return done, *files
        except (DamagedError, OSError) as error:
            print(f"{error}\nthe interrupted preparation was damaged; it starts again", file=sys.stderr)
            shutil.rmtree(folder)
            folder.mkdir()
    return Done(0, 0, 0, START, {}), CheckedWriter(tokens), CheckedWriter(records)


def _tokenized(
    chunks: Iterator[list[RawRecord]], encode: Callable[[list[RawRecord]], Encoded], workers: int | None
) -> Iterator[tuple[Tokenized, int, Position]]:
    """The tokens and counts of each chunk, in order, its size in bytes, and where the next chunk begins.

    At most two chunks per process are in work, so memory does not grow when reading is faster than tokenizing.
    """
    workers = workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    first = list(islice(chunks, workers))
    chunks = chain(first, chunks)
    if len(first) < 2:
        for chunk in chunks:
            yield _count(encode(chunk)), sum(map(size_of, chunk)), chunk[-1].after
        return
    # Forked processes have the tokenizer and all modules at once. A fork is safe: no GPU is in use yet, and the only
    # threads watch torchrun and the other ranks (runtime/). They hold no lock that a worker takes.
    pool = ProcessPoolExecutor(
        len(first), multiprocessing.get_context("fork"), initializer=_become_worker, initargs=(encode,)
    )
    try:
        running: deque[tuple[Future[Tokenized], int, Position]] = deque()
        for chunk in chunks:
            running.append((pool.submit(_encode_chunk, chunk), sum(map(size_of, chunk)), chunk[-1].after))
            if len(running) == 2 * len(first):
                future, size, after = running.popleft()
                yield future.result(), size, after
        for future, size, after in running:
            yield future.result(), size, after
    except BrokenProcessPool as error:
        raise OptionError(
            f"preprocessing_num_workers {len(first)}: a process that tokenizes was killed, perhaps for lack of memory\n"
            "pass a smaller --preprocessing_num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(encode: Callable[[list[RawRecord]], Encoded]) -> None:
    """Set up a worker: it uses one core, and it exits when its parent exits."""
    global _encode
    _encode = encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A signal may reach all processes of a job, and the parent answers it. SIGTERM may also come from the pool, which
    # ends its workers when one was killed. So a worker ends soon, but later than a parent that had the signal, too.
    ignore_signals(0)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(2, os._exit, (1,)).start())


_encode: Callable[[list[RawRecord]], Encoded]


def _encode_chunk(chunk: list[RawRecord]) -> Tokenized:
    return _count(_encode(chunk))


def _count(encoded: Encoded) -> Tokenized:
    """The tokens of all records in one array, the counts of each record, and how many have a column not used."""
    lengths = np.array([len(one.tokens) for one in encoded], np.int64)
    tokens = np.fromiter(chain.from_iterable(one.tokens for one in encoded), np.uint32, int(lengths.sum()))
    records = np.zeros(len(encoded), RECORD)
    records["tokens"], records["outcome"] = lengths, [one.outcome for one in encoded]
    records["had"] = [one.had for one in encoded]
    starts, trained = (np.cumsum(lengths) - lengths)[lengths > 0], tokens < MASKED
    records["trained_on"][lengths > 0] = np.add.reduceat(trained, starts, dtype=np.int64)
    last = np.maximum.reduceat(np.where(trained, np.arange(len(tokens)), 0), starts)
    records["last_trained"][lengths > 0] = tokens[last]
    return tokens, records, Counter(chain.from_iterable(one.unused for one in encoded))


def _check_targetless(source: Source, outcomes: NDArray[np.uint8], rendering: Rendering) -> None:
    """Refuse a source, with an example, if too many records have no token to train on."""
    found = np.flatnonzero(outcomes == Outcome.NO_TARGETS)
    allowed = rendering.max_targetless_fraction
    if len(found) > allowed * len(outcomes):
        raw = next(islice(read(source), int(found[0]), None))
        raise OptionError(
            f"max_targetless_fraction {allowed}: {len(found):,} of {len(outcomes):,} records have no "
            f"token to train on within block_size {rendering.block_size}; pass more of it, or records with answers\n"
            f"{raw.place}: {readable(raw.place, parsed(raw), rendering)[:500]!r}"
        )


def _first_held_out(outcomes: NDArray[np.uint8], percentage: int) -> int:
    """The first record of the last `percentage`, moved to the next start of a document if there is one."""
    first = math.floor(len(outcomes) * (1 - percentage / 100))
    begins = np.flatnonzero(outcomes[max(0, first - 1) : -1] != Outcome.FRAGMENT)
    return first + int(begins[0]) if first and len(begins) else first


def _write_sequences(
    folder: Path, source: Source, shape: str, packing: Packing, all_records: Records, part: slice
) -> tuple[Split, Content, Content]:
    """Write segments.bin and sequences.bin of the split that has the records of `part`. Returns its counts and both."""
    records = all_records[part]
    lengths, outcomes = records["tokens"], records["outcome"]
    folder.mkdir(exist_ok=True)
    first_token = all_records["tokens"][: part.start or 0].sum()
    sequences, segments, used = 0, 0, 0
    segments_file, sequences_file = CheckedWriter(folder / "segments.bin"), CheckedWriter(folder / "sequences.bin")
    sequences_file.write(np.zeros(1, np.int64).tobytes())
    for packed in pack_in_parts(packing, document_lengths(lengths, outcomes)):
        segments_file.write((packed.segments + first_token).tobytes())
        sequences_file.write((packed.first_segments[1:] + segments).tobytes())
        sequences, segments = sequences + len(packed.first_segments) - 1, segments + len(packed.segments)
        used += int((packed.segments[:, 1] - packed.segments[:, 0]).sum())
    written = segments_file.close(), sequences_file.close()
    number = np.bincount(outcomes, minlength=len(Outcome)).tolist()
    split = Split(
        shape=shape,
        sequences=sequences,
        tokens=int(lengths.sum()),
        trained_tokens=int(records["trained_on"].sum()),
        dropped_tokens=int(lengths.sum()) - used,
        documents=number[Outcome.DOCUMENT] + number[Outcome.TRUNCATED],
        cut_documents=number[Outcome.TRUNCATED],
        empty_documents=number[Outcome.EMPTY],
        targetless_documents=number[Outcome.NO_TARGETS],
        had_bos=int(np.count_nonzero(records["had"] & Had.BOS)),
        had_eos=int(np.count_nonzero(records["had"] & Had.EOS)),
    )
    if split.sequences == 0:
        whole = part == slice(None)  # there is no validation split
        remedy = "" if whole else " or another --validation_split_percentage"
        if folder.name == "train" and part.stop == 0:
            raise OptionError(
                f"{source.name}: all its documents are held out for validation, so none is left to train on\n"
                "pass --validation_split_percentage 0, or a --validation_file"
            )
        raise OptionError(
            f"{source.name}: {'it' if whole else f'the {folder.name} split'} has {split.tokens} tokens, less than one "
            f"sequence of block_size {packing.block_size}\npass more text, a smaller --block_size{remedy}"
        )
    return split, *written
