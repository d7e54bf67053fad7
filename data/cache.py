"""Tokenized and packed once, and found again: what is kept in `data_cache_dir`.

One process reads, and as many as there are cores tokenize; what they make is written in the order of the text, so that
it is the same with any number of them. It is memory for a few chunks of text for each process, however big the files.
What was written when a preparation was cut off is kept, and the next one goes on from there.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from config.errors import OptionError
from data.packing import Packing, pack_in_parts
from data.records import CHUNK, START, Position, Raw, chunks, read, size_of
from data.sequences import Split
from data.sources import Source
from data.tokens import MASKED, Encoded, Fate, Rendering, document_lengths, encoder, parsed, readable

FORMAT = 4  # raised when prepared files of an older version can no longer be read

RECORD = np.dtype([("tokens", "<i8"), ("trained_on", "<i8"), ("last_trained", "<u4"), ("fate", "u1")])

SYNC = 1.0  # seconds of work that a preparation loses at most when it is cut off

ABANDONED = 7 * 24 * 3600  # seconds after which what is left of one that was cut off is removed

Records = NDArray[np.void]  # of RECORD: what was counted of each record

Tokenized = tuple[NDArray[np.uint32], Records]


@dataclass(frozen=True)
class Prepared:
    """A source whose rows are on the disk, in `folder`: about.json, as a class."""

    folder: Path
    fingerprint: str
    packing: str
    stop_tokens: list[int]
    counts: dict[str, Split]


class Done(NamedTuple):
    """How far a preparation is: what has been written, the bytes that were read for it, and where to read on."""

    tokens: int
    records: int
    bytes: int
    after: Position


def prepare_source(
    source: Source, rendering: Rendering, packing: Packing, percentage: int, cache: Path, workers: int | None
) -> Prepared:
    """A source, of whose records the last `percentage` are held out: found in `cache`, or made there by `workers`."""
    key = cache_key(source, rendering, packing, percentage)
    partial = cache / f"{key}.partial"
    try:
        with FileLock(cache / f"{key}.lock"):
            if not (cache / key).exists():
                _remove_abandoned(cache)
                partial.mkdir(exist_ok=True)
                try:
                    _write(partial, source, rendering, packing, percentage, workers)
                except OptionError:
                    shutil.rmtree(partial)  # the user will change something, and it will have another key
                    raise
                partial.rename(cache / key)
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror}; pass a directory with more room") from error
    about = json.loads((cache / key / "about.json").read_text())
    counts = {name: Split(**values) for name, values in about.pop("counts").items()}
    return Prepared(cache / key, counts=counts, **about)


def cache_key(source: Source, rendering: Rendering, packing: Packing, percentage: int) -> str:
    """Changes with everything that the rows depend on: content, how it is rendered and packed, and the split."""
    facts = [FORMAT, source.key, rendering.key(), packing.key(), percentage]
    return "rows-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _remove_abandoned(cache: Path) -> None:
    """Remove what preparations have left that were cut off long ago, and that nobody has gone on with."""
    for partial in cache.glob("rows-*.partial"):
        with suppress(Timeout, FileNotFoundError), FileLock(partial.with_suffix(".lock"), timeout=0):
            if max(path.stat().st_mtime for path in [partial, *partial.iterdir()]) < time.time() - ABANDONED:
                shutil.rmtree(partial)


def _write(
    folder: Path, source: Source, rendering: Rendering, packing: Packing, percentage: int, workers: int | None
) -> None:
    """Prepare a source into `folder`, with what was counted in about.json."""
    _write_tokens(folder, source, encoder(rendering), workers)
    records: Records = np.fromfile(folder / "records.bin", RECORD)
    sequences = 2 if rendering.shape == "preference" else 1  # of each record, that stand one after the other
    fates = records["fate"][::sequences]  # both of a pair are left out, or none
    _check_targetless(source, fates, rendering)
    first = _first_held_out(fates, percentage) * sequences
    splits = {"train": slice(0, first), "validation": slice(first, None)} if percentage else {"train": slice(None)}
    counts = {
        name: _write_rows(folder / name, source, rendering.shape, packing, records, part)
        for name, part in splits.items()
    }
    digest = hashlib.sha256()
    for path in [
        folder / "tokens.bin",
        *(folder / name / file for name in splits for file in ("segments.bin", "sequences.bin")),
    ]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    stop_tokens = Counter(records["last_trained"][records["fate"] == Fate.DOCUMENT].tolist()).most_common(2)
    about = {
        "fingerprint": digest.hexdigest(),
        "packing": packing.kind,
        "stop_tokens": [token for token, _ in stop_tokens if token in rendering.tokenizer.added_tokens_decoder],
        "counts": {name: asdict(split) for name, split in counts.items()},
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2))
    (folder / "progress.json").unlink(missing_ok=True)


def _write_tokens(folder: Path, source: Source, encode: Callable[[list[Raw]], Encoded], workers: int | None) -> None:
    """Write tokens.bin and records.bin. Goes on where progress.json says that an earlier attempt was cut off."""
    done = Done(0, 0, 0, START)
    with suppress(FileNotFoundError):
        done = Done(*json.loads((folder / "progress.json").read_text()))
    plain = all(path.suffix in (".txt", ".jsonl", ".json", ".py") for path in source.files)
    size = sum(path.stat().st_size for path in source.files) if plain else 0  # of the text, if it can be known
    bar = tqdm(
        desc=f"Tokenizing {source.name}", total=size or None, initial=done.bytes, unit="B", unit_scale=True, delay=1
    )
    saved = time.monotonic()
    with open(folder / "tokens.bin", "ab") as tokens_file, open(folder / "records.bin", "ab") as records_file, bar:
        tokens_file.truncate(done.tokens * 4)
        records_file.truncate(done.records * RECORD.itemsize)
        for (tokens, records), size, after in _tokenized(chunks(read(source, done.after), CHUNK), encode, workers):
            tokens_file.write(tokens.tobytes())
            records_file.write(records.tobytes())
            done = Done(done.tokens + len(tokens), done.records + len(records), done.bytes + size, after)
            bar.update(size)
            if time.monotonic() - saved >= SYNC:
                for file in (tokens_file, records_file):
                    file.flush()
                    os.fsync(file.fileno())
                (folder / "progress.tmp").write_text(json.dumps(done))
                os.replace(folder / "progress.tmp", folder / "progress.json")
                saved = time.monotonic()


def _tokenized(
    chunks: Iterator[list[Raw]], encode: Callable[[list[Raw]], Encoded], workers: int | None
) -> Iterator[tuple[Tokenized, int, Position]]:
    """Of each chunk, in order: its tokens and records, its bytes, and where the next one begins.

    Two chunks a process are under way at most, so that memory does not depend on the speed of the reader.
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
    # Forked, they have the tokenizer and all modules at once; neither threads nor a GPU are in use yet.
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
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(encode: Callable[[list[Raw]], Encoded]) -> None:
    """Get a process of the pool ready: it uses one core, and ends when its parent does, in whatever way that ends."""
    global _encode
    _encode = encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_encode: Callable[[list[Raw]], Encoded]


def _encode_chunk(chunk: list[Raw]) -> Tokenized:
    return _count(_encode(chunk))


def _count(encoded: Encoded) -> Tokenized:
    """The tokens of records in a line, and what is counted of each record."""
    lengths = np.array([len(row) for row, _ in encoded], np.int64)
    tokens = np.fromiter(chain.from_iterable(row for row, _ in encoded), np.uint32, int(lengths.sum()))
    records = np.zeros(len(encoded), RECORD)
    records["tokens"], records["fate"] = lengths, [fate for _, fate in encoded]
    starts, learned = (np.cumsum(lengths) - lengths)[lengths > 0], tokens < MASKED
    records["trained_on"][lengths > 0] = np.add.reduceat(learned, starts, dtype=np.int64)
    last = np.maximum.reduceat(np.where(learned, np.arange(len(tokens)), 0), starts)
    records["last_trained"][lengths > 0] = tokens[last]
    return tokens, records


def _check_targetless(source: Source, fates: NDArray[np.uint8], rendering: Rendering) -> None:
    """Raises OptionError with an example, if too many records have no token to train on."""
    found = np.flatnonzero(fates == Fate.TARGETLESS)
    allowed = rendering.max_targetless_fraction
    if len(found) > allowed * len(fates):
        raw = next(islice(read(source), int(found[0]), None))
        raise OptionError(
            f"max_targetless_fraction {allowed}: {len(found):,} of {len(fates):,} records have no "
            f"token to learn within block_size {rendering.block_size}; pass it more, or records with answers\n"
            f"{raw.place}: {readable(raw.place, parsed(raw), rendering.shape, rendering.tokenizer)[:500]!r}"
        )


def _first_held_out(fates: NDArray[np.uint8], percentage: int) -> int:
    """The first record of the last `percentage`, moved on to where a document begins if one still does."""
    first = math.floor(len(fates) * (1 - percentage / 100))
    begins = np.flatnonzero(fates[max(0, first - 1) : -1] != Fate.PIECE)
    return first + int(begins[0]) if first and len(begins) else first


def _write_rows(folder: Path, source: Source, shape: str, packing: Packing, all_records: Records, part: slice) -> Split:
    """Write segments.bin and rows.bin of a split, a part of all records. Gives all that was counted."""
    records = all_records[part]
    lengths, fates = records["tokens"], records["fate"]
    folder.mkdir(exist_ok=True)
    first_token = all_records["tokens"][: part.start or 0].sum()
    rows, pieces, used = 0, 0, 0
    with open(folder / "segments.bin", "wb") as pieces_file, open(folder / "sequences.bin", "wb") as rows_file:
        np.zeros(1, np.int64).tofile(rows_file)
        for packed in pack_in_parts(packing, document_lengths(lengths, fates)):
            (packed.segments + first_token).tofile(pieces_file)
            (packed.first_segments[1:] + pieces).tofile(rows_file)
            rows, pieces = rows + len(packed.first_segments) - 1, pieces + len(packed.segments)
            used += int((packed.segments[:, 1] - packed.segments[:, 0]).sum())
    number = np.bincount(fates, minlength=len(Fate)).tolist()
    split = Split(
        shape=shape,
        rows=rows,
        tokens=int(lengths.sum()),
        trained_tokens=int(records["trained_on"].sum()),
        dropped_tokens=int(lengths.sum()) - used,
        documents=number[Fate.DOCUMENT] + number[Fate.CUT],
        cut_documents=number[Fate.CUT],
        empty_documents=number[Fate.EMPTY],
        targetless_documents=number[Fate.TARGETLESS],
    )
    if split.rows == 0:
        raise OptionError(
            f"{source.name}: the {folder.name} split has {split.tokens} tokens, less than one row of block_size "
            f"{packing.block_size}\ngive more text, a smaller --block_size or another --validation_split_percentage"
        )
    return split
