"""Records, as they are read from the files or the data set of a source, from any position on."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyarrow
from pyarrow import parquet

from config.errors import OptionError
from data.sources import Source

FRAGMENT = 16_384  # characters; a .txt file is read in fragments, so that memory does not grow with its size

CHUNK = 1 << 20  # bytes of the records that one process tokenizes together

Position = tuple[int, int, int]

"""Where a record begins: the number of its file, the byte there before decompression (of .parquet: the row), and the
number of records before it in that file."""

START: Position = (0, 0, 0)


class RawRecord(NamedTuple):
    """A record as it was read, before it is parsed."""

    place: str  # file and line, for messages
    content: bytes | dict[str, Any]  # a line of JSON, or columns
    after: Position  # where the next record begins
    begins: bool = True  # whether a document begins here
    ends: bool = True  # and whether it ends here


def read(source: Source, start: Position = START) -> Iterator[RawRecord]:
    """The records of a source from `start` on, in the order of its files. Holds a record, or a batch of Parquet rows.

    A line of a .jsonl file is not parsed here, because one process reads for all that tokenize. A .txt file is one
    document: each of its records is {"text": str}, with a fragment of it. Other records have the columns of their file
    or data set. A start within a compressed file costs reading it up to there. Raises OptionError for an unreadable
    file.
    """
    if source.dataset is not None:
        for row, record in enumerate(source.dataset.skip(start[1]), start[1]):
            yield RawRecord(f"{source.name}: row {row}", record, (0, row + 1, row + 1))
        return
    for number in range(start[0], len(source.files)):
        path = source.files[number]
        read_file = {".parquet": _read_rows, ".txt": _read_fragments, ".py": _read_fragments}.get(
            path.suffix, _read_lines
        )
        try:
            yield from read_file(path, start if number == start[0] else (number, 0, 0))
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise OptionError(f"{path}: cannot be read as {path.suffix}: {cause}") from error


def chunks(records: Iterator[RawRecord], bytes_each: int) -> Iterator[list[RawRecord]]:
    """Lists of consecutive records, of about `bytes_each`. Where a list ends depends only on its own records."""
    chunk: list[RawRecord] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += size_of(record)
        if size >= bytes_each:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def size_of(record: RawRecord) -> int:
    """The bytes of a record as it was read. Columns count as the characters of their Python repr."""
    return len(record.content) if isinstance(record.content, bytes) else len(repr(record.content))


def _read_fragments(path: Path, start: Position) -> Iterator[RawRecord]:
    """One document, in fragments of about FRAGMENT characters that add up to its exact text.

    A fragment ends where a line ends and the next one starts with a character that is no white space. Pre-tokenizers
    split there anyway, so the tokens are those of the whole text.
    """
    number, offset, records = start
    if records and offset == path.stat().st_size:
        return
    fragment: list[str] = []
    size, begins = 0, offset == 0
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            text = line.decode(errors="replace")
            if size >= FRAGMENT and not text[0].isspace():
                records += 1
                yield RawRecord(str(path), {"text": "".join(fragment)}, (number, offset, records), begins, False)
                fragment, size, begins = [], 0, False
            fragment.append(text)
            size += len(text)
            offset += len(line)
    yield RawRecord(str(path), {"text": "".join(fragment)}, (number, offset, records + 1), begins, True)


def _read_lines(path: Path, start: Position) -> Iterator[RawRecord]:
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
                yield RawRecord(f"{path}: line {lines}", line, (number, offset, lines))


def _decompressed(path: Path, compression: str) -> IO[bytes]:
    """`datasets` needs pyarrow, which reads both kinds. Python itself knows zstd from 3.14 on."""
    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression=compression)), CHUNK)


def _read_rows(path: Path, start: Position) -> Iterator[RawRecord]:
    """Rows of a .parquet file, from the row group that holds the first one."""
    number, _, first = start
    with parquet.ParquetFile(path) as file:
        ends = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
        group = int(np.searchsorted(ends, first, side="right")) - 1
        row = int(ends[group])
        for batch in file.iter_batches(batch_size=100, row_groups=list(range(group, file.num_row_groups))):
            for record in batch.to_pylist():
                row += 1
                if row > first:
                    yield RawRecord(f"{path}: row {row - 1}", record, (number, row, row))
