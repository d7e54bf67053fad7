"""Records, as they are read from the files or the data set of a source: from any position on, or a part of a file."""

import csv
import json
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import pyarrow
from pyarrow import parquet

from chat.shapes import without_padding
from config.errors import OptionError, first_line
from data.dataset_info import Entry
from data.files.bounded import BLOCK, COMPRESSIONS, check_size, lines_between, lines_of, open_text, text
from data.files.remote import File, Remote

if TYPE_CHECKING:
    import datasets

FRAGMENT = 16_384  # characters; a .txt file is read in fragments, so that memory does not grow with its size

ROWS = 100  # of a .parquet file that are read at a time

CHUNK = 1 << 20  # bytes of the records that one process tokenizes together

JSON_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|[][{}"]')  # a string, a bracket, or a quote of no string

MAX_RECORD_BYTES = 1 << 26  # the default of max_record_bytes: tokenizing a text takes about 150 times its size

WRAPPERS = ("data", "train", "rows", "records", "examples", "instances", "samples")  # keys of an object around records

Position = tuple[int, int, int]

"""Where a record begins: the number of its file, the byte there before decompression (of .parquet: the row), and the
number of lines, fragments or rows before it in that file."""

START: Position = (0, 0, 0)

Lines = Iterator[tuple[bytes, int]]  # lines of a file, and the byte where each ends


@dataclass(frozen=True)
class Source:
    """What to read: files or a data set, a name for messages, and a key that changes with the content."""

    name: str
    key: str
    files: tuple[File, ...] = ()
    dataset: "datasets.Dataset | datasets.IterableDataset | None" = None
    weight: float | None = 1.0  # in a mixture: its weight in the sequences of an epoch; None: each sequence once
    entry: Entry | None = None  # says which columns its records have, if dataset_info.json names the source
    max_record_bytes: int = MAX_RECORD_BYTES  # of a record or a line; a larger one is refused
    statuses: dict[File, tuple[object, ...]] = field(default_factory=dict)  # of the files when they were found


class Part(NamedTuple):
    """Number `number` of the `parts` parts of a file, or of the shards or rows of a data set. A stream reads parts."""

    file: int  # its number in the source, or that of a shard
    number: int
    parts: int


class RawRecord(NamedTuple):
    """A record as it was read, before it is parsed."""

    place: str  # file and line, for messages
    content: bytes | dict[str, Any]  # a JSON object, or columns
    after: Position  # where the next record begins
    begins: bool = True  # whether a document begins here
    ends: bool = True  # and whether it ends here


def read(source: Source, start: Position = START) -> Iterator[RawRecord]:
    """The records of a source from `start` on, in the order of its files. Holds a record, or a batch of Parquet rows.

    A JSON object is not parsed here, because one process reads for all that tokenize. A .txt or source file is one
    document: each of its records is {"text": str}, with a fragment of it. Other records have the columns of their file
    or data set, or the columns that the entry of the source makes of them. A start within a compressed file costs
    reading it up to there. Raises OptionError for an unreadable file.
    """
    if source.entry is None:
        yield from _read(source, start)
        return
    limit = source.entry.num_samples  # counted from the beginning, so a resume reads the first records again
    records = 0
    for raw in islice(_read(source, START if limit else start), limit):
        records += 1
        if raw.after > start:
            yield raw._replace(content=source.entry.convert(parsed(raw), raw.place))
    if limit and records < limit:
        raise OptionError(f"{source.name}: num_samples is {limit}, and there are {records} records; lower it")


def read_part(source: Source, part: Part, numbered: bool = False) -> Iterator[RawRecord]:
    """The records of one part, without reading the others: each record of a file is in one part of it.

    A text or file of lines is cut into ranges of bytes, and a record belongs to the range where it begins. A .parquet
    file is cut into groups of rows, or within them if it has fewer groups than parts. Other files have one part.
    Messages name a record by its byte, or by its line if `numbered`, which costs reading the file up to there.
    """
    for raw in _read_part(source, part, numbered):
        yield raw if source.entry is None else raw._replace(content=source.entry.convert(parsed(raw), raw.place))


def is_table(dataset: "datasets.Dataset | datasets.IterableDataset") -> "TypeGuard[datasets.Dataset]":
    """Whether a data set is on this machine, so that the number of its rows is known and any of them can be read."""
    return hasattr(dataset, "__len__")


def can_cut(path: File) -> bool:
    """Whether parts of a file can be read by themselves: if it is no table of text, no array and not compressed."""
    kind = file_format(path)
    if path.suffix.lower() in COMPRESSIONS or kind in (".csv", ".tsv"):
        return False
    # A remote file of lines is not opened for this, because there may be many of them: each is a request.
    return READERS[kind] is not _read_json or (kind != ".json" and isinstance(path, Remote)) or not _is_array(path)


def parsed(raw: RawRecord) -> dict[str, Any]:
    """The columns of a record. Raises OptionError with its place if it cannot be parsed."""
    if isinstance(raw.content, dict):
        return raw.content
    try:
        record = json.loads(raw.content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        remedy = ""
        if isinstance(error, UnicodeDecodeError):
            remedy = "\nconvert the file to UTF-8, for example: iconv -f GB18030 -t UTF-8 OLD > NEW"
        elif b"\r" in raw.content.rstrip():
            remedy = "\nend each line with a line feed, not with a carriage return alone: tr '\\r' '\\n' < OLD > NEW"
        raise OptionError(f"{raw.place}: cannot be read as JSON: {first_line(error)}{remedy}") from error
    if not isinstance(record, dict):
        raise OptionError(f"{raw.place}: must be a JSON object, not {raw.content[:100].decode(errors='replace')}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError if a key comes twice, because only the last value would be used."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)} comes twice in an object")
    return values


def _read(source: Source, start: Position) -> Iterator[RawRecord]:
    """The records of a source, with the columns of its files or data set."""
    if source.dataset is not None:
        yield from _read_dataset(source, source.dataset.skip(start[1]), "row", start[1])
        return
    for number in range(start[0], len(source.files)):
        path = source.files[number]
        begin = start if number == start[0] else (number, 0, 0)
        yield from _checked(source, path, READERS[file_format(path)](path, begin, source.max_record_bytes))


def _read_part(source: Source, part: Part, numbered: bool) -> Iterator[RawRecord]:
    """The records of a part, with the columns of its file or data set."""
    if source.dataset is not None:
        if is_table(source.dataset):
            first, end = (len(source.dataset) * number // part.parts for number in (part.number, part.number + 1))
            yield from _read_dataset(source, source.dataset.select(range(first, end)), "row", first)
        else:
            shard = source.dataset.shard(source.dataset.num_shards, part.file)
            yield from _read_dataset(source, shard, f"shard {part.file}, row", 0)
        return
    path = source.files[part.file]
    yield from _checked(source, path, _read_part_of_file(path, part, source.max_record_bytes, numbered))


def _read_part_of_file(path: File, part: Part, limit: int, numbered: bool) -> Iterator[RawRecord]:
    kind = file_format(path)
    if part.parts == 1:
        yield from READERS[kind](path, (part.file, 0, 0), limit)
    elif kind == ".parquet":
        first, end = _rows_of_part(path, part)
        yield from islice(_read_rows(path, (part.file, first, first), limit), end - first)
    else:
        size = size_of_file(path)
        begin, end = (size * number // part.parts for number in (part.number, part.number + 1))
        before = _count_lines(path, begin) if numbered and isinstance(path, Path) else None
        lines = lines_between(path, begin, end, before, limit)
        read_lines = _objects if READERS[kind] is _read_json else _fragments_of_part
        yield from read_lines(path, lines, (part.file, begin, before), end)


def _read_dataset(source: Source, dataset: Iterable[dict[str, Any]], name: str, first: int) -> Iterator[RawRecord]:
    """The rows of a data set, which are numbered from `first` on."""
    for row, record in enumerate(dataset, first):
        place = f"{source.name}: {name} {row}"
        check_size(place, size_of_value(record), source.max_record_bytes)
        yield RawRecord(place, without_padding(record), (0, row + 1, row + 1))


def _checked(source: Source, path: File, records: Iterator[RawRecord]) -> Iterator[RawRecord]:
    """The records of a file. Raises OptionError if it cannot be read, or is changed meanwhile."""
    try:
        _check_unchanged(source, path)
        yield from records
        if isinstance(path, Path):
            _check_unchanged(source, path)  # a remote file is asked about once for each part
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        remedy = "check that it is complete and has the format of its name; copy or download it again"
        if isinstance(path, Remote) and isinstance(error, OSError):
            remedy = "look at the network and the server; then continue with --resume_from_checkpoint auto"
        raise OptionError(f"{path}: cannot be read as {path.suffix}: {first_line(error)}\n{remedy}") from error


def status_of(path: File) -> tuple[object, ...]:
    """Device, inode, size and time of the last change of the content. They differ if the file was changed."""
    if isinstance(path, Remote):
        return path.status()
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def size_of_file(path: File) -> int:
    """The bytes of a file; of a remote one, when it was found."""
    return path.size if isinstance(path, Remote) else path.stat().st_size


def _check_unchanged(source: Source, path: File) -> None:
    """Refuse a file that was changed after it was found: its records would be some of each version."""
    if source.statuses.get(path, status := status_of(path)) != status:
        raise OptionError(f"{path}: was changed while it was read\nstart again when no program writes to it")


def file_format(path: File) -> str:
    """The suffix of a file in lower case, without that of its compression, such as .jsonl."""
    *_, last = ("", *(suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS))
    return last


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


def size_of_value(value: Any) -> int:
    """About the bytes of a value of columns: the characters of its texts, and 8 for anything else."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size_of_value, value.values()))
    return sum(map(size_of_value, value)) if isinstance(value, list) else 8


def _read_fragments(path: File, start: Position, limit: int) -> Iterator[RawRecord]:
    """One document, in fragments of about FRAGMENT characters that add up to its exact text.

    A fragment ends where a line ends and the next one starts with a character that is no white space. Pre-tokenizers
    split there anyway, so the tokens are those of the whole text.
    """
    if start[2] and start[1] == size_of_file(path):
        return
    yield from _fragments(path, lines_of(path, start[1], None, limit), start, None)


def _fragments(path: File, lines: Lines, start: Position, stop: int | None) -> Iterator[RawRecord]:
    """The fragments that begin before byte `stop`, or all."""
    number, offset, records = start
    fragment: list[str] = []
    size, begins = 0, offset == 0
    for line, end in lines:
        decoded = text(path, line, end - len(line))
        stops = stop is not None and offset >= stop
        if (size >= FRAGMENT or stops) and not decoded[0].isspace():
            records += 1
            yield RawRecord(str(path), {"text": "".join(fragment)}, (number, offset, records), begins, False)
            if stops:
                return
            fragment, size, begins = [], 0, False
        fragment.append(decoded)
        size += len(decoded)
        offset = end
    yield RawRecord(str(path), {"text": "".join(fragment)}, (number, offset, records + 1), begins, True)


def _fragments_of_part(path: File, lines: Lines, start: tuple[int, int, int | None], stop: int) -> Iterator[RawRecord]:
    """The fragments of a range of bytes. Its first one begins where `_fragments` may end one."""
    number, begin, _ = start
    for line, end in lines:
        offset = end - len(line)
        if begin and offset >= stop:
            return
        if not begin or not text(path, line, offset)[0].isspace():
            yield from _fragments(path, chain([(line, end)], lines), (number, offset if begin else 0, 0), stop)
            return


def _read_json(path: File, start: Position, limit: int) -> Iterator[RawRecord]:
    """The objects of a file: one in a line, or all of them in one array, whichever its first character says."""
    if _is_array(path):
        yield from _read_array(path, start, limit)
        return
    yield from _objects(path, lines_of(path, start[1], start[2], limit), start, None)


def _is_array(path: File) -> bool:
    file, _ = open_text(path, 0)
    with file:
        first = next((block.lstrip() for block in iter(partial(file.read, 4096), b"") if block.strip()), b"")
    return first.startswith(b"[")


def _objects(path: File, lines: Lines, start: tuple[int, int, int | None], stop: int | None) -> Iterator[RawRecord]:
    """One JSON object in a line, of the lines that begin before byte `stop`, or of all.

    Raises OptionError if the first object of the file spans lines, or holds all records. The number of the lines before
    may not be known.
    """
    number, offset, before = start
    begins = offset == 0
    for count, (line, end) in enumerate(lines, 1):
        if line.strip():
            if begins:
                _check_first_object(path, line, end)
                begins = False
            place = f"at byte {end - len(line):,}" if before is None else f"{before + count}"
            yield RawRecord(f"{path}: line {place}", line, (number, end, (before or 0) + count))
        if stop is not None and end >= stop:
            return  # so that the line after the range is not read


def _count_lines(path: Path, end: int) -> int:
    """The number of the lines that begin before the first one that begins at byte `end` or later."""
    if end == 0:
        return 0
    with open(path, "rb") as file:
        blocks = (file.read(min(BLOCK, end - 1 - offset)) for offset in range(0, end - 1, BLOCK))
        return 1 + sum(block.count(b"\n") for block in blocks)


def _check_first_object(path: File, line: bytes, end: int) -> None:
    count = dict.fromkeys((b"{", b"}", b"[", b"]"), 0)
    for token in JSON_TOKEN.finditer(line):
        if token[0] == b'"':
            return  # a string that does not end; the parser of JSON says where
        if token[0] in count:
            count[token[0]] += 1
    if count[b"{"] > count[b"}"]:
        raise OptionError(
            f"{path}: line 1: the JSON object does not end in its line, so it is cut off or spans several lines\n"
            f"write one record in a line, or all in one array: jq -c . {path.name} > lines.jsonl"
        )
    if end == size_of_file(path) and count[b"["]:  # the only line
        record = parsed(RawRecord(f"{path}: line 1", line, START))
        for key in WRAPPERS:
            if isinstance(items := record.get(key), list) and items and isinstance(items[0], dict):
                raise OptionError(
                    f"{path}: is one JSON object, whose key {key} holds {len(items)} records\n"
                    f"write one record in a line: jq -c '.{key}[]' {path.name} > lines.jsonl"
                )


def _read_array(path: File, start: Position, limit: int) -> Iterator[RawRecord]:
    """The objects of one JSON array, over any number of lines or in one. Holds an object, and a block of the file.

    The brackets outside of strings tell where an object ends.
    """
    number, offset, lines = start  # `lines`: the ends of lines before `counted`
    opened, separator, closed = offset > 0, b"," if offset else b"", False  # what must come before the next object
    depth, place, gap = 0, "", b""
    pieces: list[bytes] = []  # of the object that is read

    def check(found: bytes, expected: bytes) -> None:
        if found.strip() != expected:
            shown = found.strip()[:50].decode(errors="replace") or "no comma"
            wanted = "an array of JSON objects with commas between them"
            raise OptionError(f"{path}: line {lines + 1}: {shown!r} is here, and the file must be {wanted}")

    def unclosed() -> OptionError:
        return OptionError(f"{path}: line {lines + 1}: a text is not closed by a quote in its line")

    file, end = open_text(path, offset)
    data = left = b""  # `left`: the beginning of a string that does not end in the block
    with file:
        while block := file.read(max(BLOCK, len(left))):
            data, end = left + block, end + len(block)
            begin, left = end - len(data), b""
            done = counted = 0  # `done`: the bytes of `data` that are in an object, or checked
            for token in JSON_TOKEN.finditer(data):
                kind = token[0]
                lines, counted = lines + data.count(b"\n", counted, token.start()), token.start()
                if depth == 0:
                    gap += data[done : token.start()]
                    done = token.start()
                    if kind == b"[" and not opened:
                        check(gap, b"")
                        opened, gap, done = True, b"", token.end()
                    elif kind == b"]" and opened and not closed:
                        check(gap, b"")
                        closed, gap, done = True, b"", token.end()
                    elif kind == b"{" and opened and not closed:
                        check(gap, separator)
                        depth, place, gap, pieces = 1, f"{path}: line {lines + 1}", b"", []
                    else:
                        check(gap + kind, b"")
                elif kind in (b"{", b"["):
                    depth += 1
                elif kind in (b"}", b"]"):
                    depth -= 1
                    if depth == 0:
                        pieces.append(data[done : token.end()])
                        done, separator, item = token.end(), b",", b"".join(pieces)
                        check_size(place, len(item), limit)
                        yield RawRecord(place, item, (number, begin + done, lines))
                elif kind == b'"':
                    left = data[token.start() :]
                    if b"\n" in left:
                        raise unclosed()
                    break
            rest = data[done : len(data) - len(left)]
            lines += data.count(b"\n", counted)
            if depth:
                pieces.append(rest)
                check_size(place, sum(map(len, pieces)) + len(left), limit)
            elif gap := (gap + rest).strip():
                check(gap, b"" if closed else separator)
    if left:
        raise unclosed()
    lines -= data.endswith(b"\n")
    if depth or not closed:
        raise OptionError(f"{path}: line {lines + 1}: the file ends before its array does; it may be cut off")
    check(gap, b"")


def _read_table(path: File, start: Position, limit: int) -> Iterator[RawRecord]:
    """The rows of a .csv or .tsv file, as texts. Its first row has the names of the columns."""
    number, begin, before = start
    with closing(_read_cells(path, 0, 0, limit)) as cells:
        header, _, offset, lines = next(cells, ([], 1, 0, 0))
    separator, other = ("tab", ";") if file_format(path) == ".tsv" else ("comma", ";\t")
    if len(header) == 1 and set(other) & set(header[0]):
        raise OptionError(f"{path}: line 1: one column {header[0]!r}: the separator of columns must be a {separator}")
    if len(set(header)) < len(header):
        raise OptionError(f"{path}: line 1: two columns have one name: {', '.join(header)}; rename one of them")
    begin, before = max((begin, before), (offset, lines))
    for row, line, offset, lines in _read_cells(path, begin, before, limit):
        if len(row) != len(header):
            raise OptionError(f"{path}: line {line}: has {len(row)} cells, and the first line names {len(header)}")
        yield RawRecord(f"{path}: line {line}", dict(zip(header, row, strict=True)), (number, offset, lines))


def _read_cells(
    path: File, offset: int, lines: int, limit: int
) -> Generator[tuple[list[str], int, int, int], None, None]:
    """The cells of each row, the line where it begins, and the byte and the number of lines after it."""
    before, offsets, begin = lines, [offset], offset  # a row begins at byte `begin`

    def decoded() -> Iterator[str]:
        for line, offsets[0] in lines_of(path, offset, lines, limit):
            if offsets[0] - begin > limit:
                check_size(f"{path}: the row that begins in line {row_line}", offsets[0] - begin, limit)
            yield text(path, line, offsets[0] - len(line))

    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(decoded(), delimiter="\t" if file_format(path) == ".tsv" else ",", strict=True)
    while True:
        row_line, begin = before + rows.line_num + 1, offsets[0]
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise OptionError(f"{path}: line {row_line}: cannot be read as {file_format(path)}: {error}") from error
        if row is None:
            return
        if row:  # an empty line is no row
            yield row, row_line, offsets[0], before + rows.line_num


def _read_rows(path: File, start: Position, limit: int) -> Iterator[RawRecord]:
    """Rows of a .parquet file, from the row group that holds the first one.

    Reads 100 rows at a time, or fewer if rows are large. Large rows become Python objects one by one.
    """
    number, _, first = start
    with parquet.ParquetFile(path.open() if isinstance(path, Remote) else path) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise OptionError(f"{path}: two columns have one name: {', '.join(columns)}; rename one of them")
        ends = np.cumsum([0, *(group.num_rows for group in groups)])
        begin = int(np.searchsorted(ends, first, side="right")) - 1
        row = int(ends[begin])
        for index in range(begin, len(groups)):
            group = groups[index]
            mean = group.total_byte_size // max(1, group.num_rows)  # decompressed
            check_size(f"{path}: a row of rows {row} to {row + group.num_rows - 1}", mean, limit)
            rows = max(1, min(ROWS, limit // max(1, mean)))
            for batch in file.iter_batches(batch_size=rows, row_groups=[index]):
                for part in [batch] if batch.nbytes <= limit else (batch.slice(at, 1) for at in range(len(batch))):
                    check_size(f"{path}: row {row}", part.nbytes // len(part), limit)
                    try:
                        records = part.to_pylist()
                    except UnicodeDecodeError as error:
                        place = f"{path}: a text of rows {row} to {row + len(part) - 1}"
                        raise OptionError(f"{place} is not in UTF-8; write it again: {first_line(error)}") from error
                    for record in records:
                        row += 1
                        if row > first:
                            yield RawRecord(f"{path}: row {row - 1}", without_padding(record), (number, row, row))


def _rows_of_part(path: File, part: Part) -> tuple[int, int]:
    """The first row of a part and of the next one: whole row groups, unless there are fewer groups than parts."""
    with parquet.ParquetFile(path.open() if isinstance(path, Remote) else path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    numbers = (part.number, part.number + 1)
    if len(rows) < part.parts:
        first, end = (sum(rows) * number // part.parts for number in numbers)
    else:
        first, end = (sum(rows[: len(rows) * number // part.parts]) for number in numbers)
    return first, end


# The suffixes of source code and of texts with markup. Each file is one document, as a .txt file is.
SOURCE_SUFFIXES = (
    *(".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".css", ".yaml", ".yml", ".toml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".cs", ".java", ".kt", ".scala", ".go"),
    *(".rs", ".swift", ".m", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".php", ".rb", ".pl", ".lua", ".r", ".jl"),
    *(".hs", ".ml", ".ex", ".erl", ".clj", ".f90", ".v", ".sv", ".vhd", ".lean", ".sh", ".bash", ".ps1", ".sql"),
)

READERS = {
    ".txt": _read_fragments,
    **dict.fromkeys(SOURCE_SUFFIXES, _read_fragments),
    ".jsonl": _read_json,
    ".json": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_rows,
}

"""How each format is read."""
