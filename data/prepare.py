"""Documents are tokenized and packed once, and kept in `data_cache_dir`. This may be done ahead, on a host without GPU:

    python -m data.prepare OPTIONS          the options of train.py

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
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from config.checks import check_data
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from data.packing import pack_in_parts
from data.records import CHUNK, START, Position, Raw, chunks, read, size_of
from data.sequences import Mixture, PreparedDataset, Split, total
from data.sources import Source, cache_directory, find_sources
from data.stream import StreamingDataset
from data.tokens import MASKED, Encoded, Fate, detect_shape, document_lengths, encoder, parsed, readable
from model.build import load_config_and_tokenizer

FORMAT = 4  # raised when prepared files of an older version can no longer be read

RECORD = np.dtype([("tokens", "<i8"), ("trained_on", "<i8"), ("last_trained", "<u4"), ("fate", "u1")])

SYNC = 1.0  # seconds of work that a preparation loses at most when it is cut off

ABANDONED = 7 * 24 * 3600  # seconds after which what is left of one that was cut off is removed

Records = NDArray[np.void]  # of RECORD: what was counted of each record

Tokenized = tuple[NDArray[np.uint32], Records]


@dataclass(frozen=True)
class Data:
    """Training and validation rows, with their counts and a fingerprint (SHA-256) of all their tokens."""

    source: str
    tokenizer: str
    fingerprint: str
    packing: str
    stop_tokens: list[int]  # the special tokens with which documents end, as far as they are learned; at most two
    train: "PreparedDataset | Mixture | StreamingDataset"
    validation: PreparedDataset | Mixture | None
    counts: dict[str, Split]


def tokens_per_sequence(data: Data, block_size: int) -> int:
    """The slots of a row: a pair has two sequences."""
    return block_size * (2 if data.packing == "pairs" else 1)


def describe_data(data: Data, block_size: int) -> dict[str, str]:
    """What was prepared, for the start block and for data/prepare.py."""
    held_out = data.counts.get("validation")
    validation = f"{held_out.documents:,} documents, {held_out.rows:,} rows" if held_out else "none"
    if "train" not in data.counts:
        rows = f"of up to {block_size} tokens, packing {data.packing}"
        return {"tokenizer": data.tokenizer, "data": data.source, "rows": rows, "validation": validation}
    train, slots = data.counts["train"], tokens_per_sequence(data, block_size)
    lines = {
        "tokenizer": data.tokenizer,
        "data": f"{data.source}: {train.documents:,} documents ({train.shape}), {train.tokens:,} tokens, "
        f"{train.trained_tokens / train.tokens:.1%} of them learned",
        "left out": f"{train.empty_documents} empty documents, {train.targetless_documents} with nothing to learn, "
        f"what {train.cut_documents} documents had beyond a row, {train.dropped_tokens} tokens of a last partial row",
        "rows": f"{train.rows:,} of {slots} tokens, packing {data.packing}, "
        f"{train.filled(slots):.2%} of their slots used",
        "validation": validation,
    }
    if len(data.train.sources) > 1:
        drawn = [f"{quota:,} from {rows:,} rows" for rows, quota in data.train.sources]
        lines["mixture"] = f"an epoch draws {', '.join(drawn)}"
    return lines


GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"  # green, gray


def show_examples(
    rows: PreparedDataset | Mixture | StreamingDataset, number: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The first rows as text: learned tokens in green, given ones in gray, and a line between rows and documents."""
    lines = []
    for row in islice(iter(rows), number):
        lines.append(f"--- row {row.number}: {len(row.tokens)} tokens, {int(row.trained_on.sum())} of them learned ---")
        start = 0
        for length in row.segment_lengths:
            piece = zip(
                row.tokens[start : start + length].tolist(),
                row.trained_on[start : start + length].tolist(),
                strict=True,
            )
            runs = [(learned, [token for token, _ in run]) for learned, run in groupby(piece, key=lambda pair: pair[1])]
            lines.append("".join((GREEN if learned else GRAY) + tokenizer.decode(ids) + PLAIN for learned, ids in runs))
            start += length
    return "\n".join([*lines, f"--- {GREEN}learned{PLAIN}, {GRAY}given{PLAIN} ---"])


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


def prepare_data(options: Options, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows that `options` ask for, from the cache or made now. Raises OptionError.

    Every rank may call this before there is a process group: the first one to come prepares, the others wait for its
    lock, as long as that takes, and read what it wrote.
    """
    sources, held_out = find_sources(options)
    if options.streaming:
        return _stream(sources[0], held_out, options, tokenizer)
    percentage = 0 if held_out else options.validation_split_percentage
    parts = [_prepare_source(source, percentage, options.packing, options, tokenizer) for source in sources]
    packing = parts[0].packing
    if any(part.packing != packing for part in parts):
        raise OptionError("train_mixture: conversations and texts would be packed in different ways; pass --packing")
    padded_length = options.block_size if packing == "documents" else None
    train = [PreparedDataset(part.folder / "train", padded_length) for part in parts]
    counts = {"train": total([part.counts["train"] for part in parts])}
    validation: list[PreparedDataset] = []
    fingerprints = [part.fingerprint for part in parts]
    if held_out:
        prepared = _prepare_source(held_out, 0, packing, options, tokenizer)
        validation, counts["validation"] = (
            [PreparedDataset(prepared.folder / "train", padded_length)],
            prepared.counts["train"],
        )
        fingerprints.append(prepared.fingerprint)
    elif percentage:
        validation = [PreparedDataset(part.folder / "validation", padded_length) for part in parts]
        counts["validation"] = total([part.counts["validation"] for part in parts])
    weights = [source.weight for source in sources]
    return Data(
        source=", ".join(source.name for source in sources),
        tokenizer=_name(tokenizer, options),
        fingerprint=hashlib.sha256(json.dumps([weights, fingerprints]).encode()).hexdigest(),
        packing=packing,
        stop_tokens=sorted({token for part in parts for token in part.stop_tokens}),
        train=train[0] if len(train) == 1 else Mixture(train, weights),
        validation=None if not validation else validation[0] if len(validation) == 1 else Mixture(validation),
        counts=counts,
    )


def _stream(source: Source, held_out: Source | None, options: Options, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Training rows that are made while they are learned from, and validation rows that are prepared."""
    shape = detect_shape(source, next(read(source), None), options)
    packing = options.packing or ("concat" if shape == "text" else "documents")
    train = StreamingDataset(source, shape, packing, options, tokenizer)
    counts: dict[str, Split] = {}
    validation = None
    keys = [_cache_key(source, 0, packing, options, tokenizer)]
    if held_out:
        prepared = _prepare_source(held_out, 0, packing, options, tokenizer)
        validation, counts["validation"] = (
            PreparedDataset(prepared.folder / "train", train.padded_length),
            prepared.counts["train"],
        )
        keys.append(prepared.fingerprint)
    return Data(
        source=f"{source.name}, streamed",
        tokenizer=_name(tokenizer, options),
        fingerprint=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        packing=packing,
        stop_tokens=[tokenizer.eos_token_id] if shape == "text" else [],
        train=train,
        validation=validation,
        counts=counts,
    )


def _name(tokenizer: PreTrainedTokenizerBase, options: Options) -> str:
    name = options.tokenizer_name or tokenizer.name_or_path or "embedded"
    return f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens, {name}"


def _prepare_source(
    source: Source, percentage: int, packing: str | None, options: Options, tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """One source, of whose records the last `percentage` are held out."""
    cache, key = cache_directory(options), _cache_key(source, percentage, packing, options, tokenizer)
    partial = cache / f"{key}.partial"
    try:
        with FileLock(cache / f"{key}.lock"):
            if not (cache / key).exists():
                _remove_abandoned(cache)
                partial.mkdir(exist_ok=True)
                try:
                    _write(partial, source, percentage, packing, options, tokenizer)
                except OptionError:
                    shutil.rmtree(partial)  # the user will change something, and it will have another key
                    raise
                partial.rename(cache / key)
    except OSError as error:
        raise OptionError(f"data_cache_dir {cache}: {error.strerror}; pass a directory with more room") from error
    about = json.loads((cache / key / "about.json").read_text())
    counts = {name: Split(**values) for name, values in about.pop("counts").items()}
    return Prepared(cache / key, counts=counts, **about)


def _cache_key(
    source: Source, percentage: int, packing: str | None, options: Options, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Changes with everything that the rows depend on: content, tokenizer, row length, packing and split."""
    facts = [
        FORMAT,
        source.key,
        percentage,
        packing,
        options.text_column,
        options.data_format,
        options.max_targetless_fraction,
        tokenizer.chat_template,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.eos_token_id,
        options.block_size,
        options.objective,
    ]
    return "rows-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _remove_abandoned(cache: Path) -> None:
    """Remove what preparations have left that were cut off long ago, and that nobody has gone on with."""
    for partial in cache.glob("rows-*.partial"):
        with suppress(Timeout, FileNotFoundError), FileLock(partial.with_suffix(".lock"), timeout=0):
            if max(path.stat().st_mtime for path in [partial, *partial.iterdir()]) < time.time() - ABANDONED:
                shutil.rmtree(partial)


def _write(
    folder: Path,
    source: Source,
    percentage: int,
    packing: str | None,
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prepare a source into `folder`, with what was counted in about.json."""
    shape = detect_shape(source, next(read(source), None), options)
    packing = packing or {"text": "concat", "preference": "pairs"}.get(shape, "documents")
    _write_tokens(folder, source, encoder(shape, options, tokenizer), options.preprocessing_num_workers)
    records: Records = np.fromfile(folder / "records.bin", RECORD)
    sequences = 2 if shape == "preference" else 1  # of each record, that stand one after the other
    fates = records["fate"][::sequences]  # both of a pair are left out, or none
    _check_targetless(source, shape, fates, options, tokenizer)
    first = _first_held_out(fates, percentage) * sequences
    splits = {"train": slice(0, first), "validation": slice(first, None)} if percentage else {"train": slice(None)}
    counts = {
        name: _write_rows(folder, name, source, records, part, packing, options, shape) for name, part in splits.items()
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
        "packing": packing,
        "stop_tokens": [token for token, _ in stop_tokens if token in tokenizer.added_tokens_decoder],
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
        desc=f"Tokenizing {source.name}",
        total=size or None,
        initial=done.bytes,
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
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


def _check_targetless(
    source: Source, shape: str, fates: NDArray[np.uint8], options: Options, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises OptionError with an example, if more than `max_targetless_fraction` of the records have nothing to learn."""
    found = np.flatnonzero(fates == Fate.TARGETLESS)
    if len(found) > options.max_targetless_fraction * len(fates):
        raw = next(islice(read(source), int(found[0]), None))
        raise OptionError(
            f"max_targetless_fraction {options.max_targetless_fraction}: {len(found):,} of {len(fates):,} records have no "
            f"token to learn within block_size {options.block_size}; pass it more, or records with answers\n"
            f"{raw.place}: {readable(raw.place, parsed(raw), shape, tokenizer)[:500]!r}"
        )


def _first_held_out(fates: NDArray[np.uint8], percentage: int) -> int:
    """The first record of the last `percentage`, moved on to where a document begins if one still does."""
    first = math.floor(len(fates) * (1 - percentage / 100))
    begins = np.flatnonzero(fates[max(0, first - 1) : -1] != Fate.PIECE)
    return first + int(begins[0]) if first and len(begins) else first


def _write_rows(
    folder: Path,
    name: str,
    source: Source,
    all_records: Records,
    part: slice,
    packing: str,
    options: Options,
    shape: str,
) -> Split:
    """Write segments.bin and rows.bin of a split, a part of all records. Gives all that was counted."""
    assert options.block_size
    records = all_records[part]
    lengths, fates = records["tokens"], records["fate"]
    (folder / name).mkdir(exist_ok=True)
    first_token = all_records["tokens"][: part.start or 0].sum()
    rows, pieces, used = 0, 0, 0
    with (
        open(folder / name / "segments.bin", "wb") as pieces_file,
        open(folder / name / "sequences.bin", "wb") as rows_file,
    ):
        np.zeros(1, np.int64).tofile(rows_file)
        for packed in pack_in_parts(packing, document_lengths(lengths, fates), options.block_size):
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
            f"{source.name}: the {name} split has {split.tokens} tokens, less than one row of block_size "
            f"{options.block_size}\npass more text, a smaller --block_size or another --validation_split_percentage"
        )
    return split


def main(argv: list[str]) -> None:
    """Prepare, and print what there is. Raises OptionError."""
    transformers.utils.logging.set_verbosity_error()
    options = parse(argv)
    check_data(options)
    data = prepare_data(options, load_config_and_tokenizer(options)[1])
    assert options.block_size
    print("\n".join(f"{key:<13} {value}" for key, value in describe_data(data, options.block_size).items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"data.prepare: error: {error}", file=sys.stderr)
        sys.exit(2)
