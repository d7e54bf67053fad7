"""Files of text with a record that is too large, or that change or are no files: read with a bound, or refused."""

import gzip
import json
import multiprocessing
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from config.errors import OptionError
from config.options import Options
from data.prepare import prepare_data
from data.records import RawRecord, Source, parsed, read
from data.sources import find_sources

GIB = 1 << 30
ROOM = 3 * GIB // 4  # bytes of address space that reading may take: a line of 64 MiB, but never the whole record


def repeated(compress: Callable[[bytes], bytes], begin: bytes, content: bytes, times: int) -> bytes:
    """Compressed frames one after the other, as `cat` joins them: `begin`, and then `content` many times."""
    return compress(begin) + compress(content) * times


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def sparse(path: Path, begin: bytes) -> None:
    """A file of 8 GiB that takes no room on the disk: `begin`, and zero bytes."""
    path.write_bytes(begin)
    os.truncate(path, 8 * GIB)


LONG_LINE = b"words " * 20 + b"\n"
WORDS, TIMES = b"a word " * (1 << 20), 1171  # together more than 8 GiB

HUGE: dict[str, Callable[[Path], object]] = {
    "lines.jsonl.gz": lambda path: path.write_bytes(repeated(gzip.compress, b'{"text": "', WORDS, TIMES)),
    "lines.jsonl.zst": lambda path: path.write_bytes(repeated(zstd, b'{"text": "', WORDS, TIMES)),
    "array.json.gz": lambda path: path.write_bytes(repeated(gzip.compress, b'[{"text": "', WORDS, TIMES)),
    "numbers.json.zst": lambda path: path.write_bytes(repeated(zstd, b'[{"text": [1', b",1" * (1 << 22), 1024)),
    "deep.jsonl.zst": lambda path: path.write_bytes(repeated(zstd, b'{"text": ', b"[" * (1 << 23), 1024)),
    "cell.csv.gz": lambda path: path.write_bytes(repeated(gzip.compress, b'text\n"', WORDS, TIMES)),
    "lines-in-a-cell.csv.zst": lambda path: path.write_bytes(repeated(zstd, b'text\n"', LONG_LINE * 65536, 1024)),
    "lines.jsonl": lambda path: sparse(path, b'{"text": "'),
    "array.json": lambda path: sparse(path, b'[{"text": "'),
    "text.txt": lambda path: sparse(path, b"words"),
    "table.tsv": lambda path: sparse(path, b"text\n"),
}


def read_in_little_memory(path: Path, answer: "multiprocessing.connection.Connection") -> None:
    """Read a file in a process that has ROOM more address space, and send the error."""
    now = int(re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    try:
        for raw in read(Source("text", "key", (path,))):
            parsed(raw)
        answer.send("read to its end")
    except BaseException as error:
        answer.send(f"{type(error).__name__}: {error}")


@pytest.mark.fault(
    "data",
    "a record of 8 GiB: in one compressed line, an array, a cell over many lines, a text without line ends",
    "refused at max_record_bytes with its file and line, in less than 768 MiB of memory",
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the size of a process from /proc")
@pytest.mark.parametrize("name", HUGE)
def test_a_huge_record(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    HUGE[name](path)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=read_in_little_memory, args=(path, theirs))
    process.start()
    theirs.close()
    message = ours.recv()
    process.join()
    line = 2 if name.endswith((".tsv", ".csv.gz", ".csv.zst")) else 1
    place = f"{path}: the row that begins in line 2" if name.startswith("lines-in") else f"{path}: line {line}"
    place = f"{path}: line at byte 0" if name.endswith(".txt") else place
    assert message.startswith(f"OptionError: max_record_bytes 67108864: {place} has more bytes than that\n")
    assert "pass a larger --max_record_bytes" in message
    assert len(message.splitlines()) == 2


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        data_cache_dir=str(tmp_path / "cache"),
        block_size=32,
        validation_split_percentage=0,
        packing="none",
        preprocessing_num_workers=1,
        max_record_bytes=4000,
    )


LINE = b'{"text": "some words"}\n'
LONG = b"word " * 1000
TABLE = {"text": ["some words"] * 300 + ["word " * 1000, "last"]}


def write_table(path: Path) -> None:
    parquet.write_table(pyarrow.table(TABLE), path, row_group_size=150)


def write_one_row(path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["word " * 1000]}), path)


LARGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.jsonl": (lambda path: path.write_bytes(LINE * 3 + b'{"text": "' + LONG + b'"}\n'), ": line 4 has"),
    "a.json": (lambda path: path.write_bytes(b"[" + LINE + b', {"text": "' + LONG + b'"}]'), ": line 2 has"),
    "a.csv": (lambda path: path.write_bytes(b"text\nsome\n" + LONG), ": line 3 has"),
    "a.txt": (lambda path: path.write_bytes(b"some words\n" + LONG), ": line at byte 11 has"),
    "a.parquet": (write_table, ": row 300 has"),
    "one.parquet": (write_one_row, ": a row of rows 0 to 0 has"),
}


@pytest.mark.fault(
    "data",
    "a record beyond max_record_bytes in each format, for prepared data and for a stream",
    "refused with file, line, limit and remedy; a larger limit reads it",
)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_a_record_beyond_the_limit(
    name: str, streaming: bool, options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / name
    LARGE[name][0](path)
    options.train_file, options.streaming = str(path), streaming

    def sequences() -> int:
        return sum(1 for _, sequence in zip(range(400), iter(prepare_data(options, tokenizer).train), strict=False))

    with pytest.raises(OptionError, match=re.escape(f"max_record_bytes 4000: {path}{LARGE[name][1]} more bytes")):
        sequences()
    options.max_record_bytes = 6000
    assert sequences() > 20


def test_an_array_in_one_line(tmp_path: Path) -> None:
    """It is read in blocks, so it may be larger than a record. Strings, escapes and objects cross the blocks."""
    texts = ['a "quote", a \\ and a }' + "x" * size for size in range(0, 3000, 7)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text, "more": {"list": [1, "]"]}} for text in texts]))
    source = Source("text", "key", (path,), max_record_bytes=4000)

    def read_in_blocks(size: int) -> list[RawRecord]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.records.BLOCK", size)
            return list(read(source))

    records = read_in_blocks(1 << 20)
    assert [parsed(record)["text"] for record in records] == texts
    for size in (1, 2, 61, 4096):
        assert read_in_blocks(size) == records
    for number in (0, 100, 428):
        assert list(read(source, records[number].after)) == records[number + 1 :]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def beside_a_file(path: Path) -> Path:
    os.mkfifo(path)
    (path.parent / "z.jsonl").write_bytes(LINE)
    return path.parent


def unequal_shards(path: Path) -> Path:
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    parquet.write_table(pyarrow.table({"body": ["b"]}), path.with_name("b.parquet"))
    return path.parent


def one_name(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)


def not_unicode(path: Path) -> None:
    offsets, content = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, content])
    parquet.write_table(pyarrow.Table.from_arrays([text], names=["text"]), path)


def nested(name: str, **more: object) -> Callable[[Path], object]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = {"messages": turns, **more, name: "[" * 100_000}
    return lambda path: path.write_text(json.dumps(record))


LIES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a named pipe": ("a.jsonl", pipe, "is a pipe or a device\nwrite its content to a file"),
    "a named pipe in a directory": ("a.jsonl", beside_a_file, "is a pipe or a device\nwrite its content to a file"),
    "a device": ("a.jsonl", lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
    "a link to itself": ("a.jsonl", lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a link to nothing": ("a.jsonl", lambda path: path.symlink_to(f"{path}-gone"), "No such file or directory"),
    "a directory without files": ("a", lambda path: path.mkdir(), "no file there has one of the suffixes"),
    "a .gz that ends early": (
        "a.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress(LINE * 99)[:-9]),
        "cannot be read as",
    ),
    "garbage after a .gz": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(LINE) + LINE), "copy or download it"),
    "lines that end in CR alone": ("a.jsonl", lambda path: path.write_bytes(b'{"text": "a"}\r' * 2), "tr '\\\\r' "),
    "zero bytes after the last line": (
        "a.jsonl",
        lambda path: path.write_bytes(LINE + bytes(512)),
        "line 2: cannot be",
    ),
    "shards of other columns": ("a.parquet", unequal_shards, "b.parquet: row 0 has no text in column text"),
    "two columns of one name": ("a.parquet", one_name, "two columns have one name: text, text; rename"),
    "a text that is not UTF-8": ("a.parquet", not_unicode, "a text of rows 0 to 0 is not in UTF-8"),
    "tools nested too deep": ("a.jsonl", nested("tools"), "line 1: tools is not JSON: maximum recursion"),
    "messages nested too deep": ("a.jsonl", nested("messages"), "line 1: messages is not JSON: maximum recursion"),
    "a number of a million digits": (
        "a.jsonl",
        lambda path: path.write_bytes(b'{"text": "a", "n": ' + b"1" * 1_000_000 + b"}"),
        "line 1: cannot be read as JSON: Exceeds the limit",
    ),
}


@pytest.mark.fault(
    "data",
    "a training file that is a pipe, a device, a link to itself, cut off, not UTF-8, nested too deep, of other columns",
    "refused with its name in at most three lines, for prepared data and for a stream; nothing hangs",
)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_lies(
    kind: str, streaming: bool, options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    name, make, expected = LIES[kind]
    path = tmp_path / "data" / name
    path.parent.mkdir()
    made = make(path)
    options.train_file = str(made if isinstance(made, Path) else path)
    options.streaming, options.max_record_bytes = streaming, 1 << 26
    with pytest.raises(OptionError, match=expected) as found:
        for _ in zip(range(9), iter(prepare_data(options, tokenizer).train), strict=False):
            pass
    assert str(path.parent) in str(found.value)
    assert len(str(found.value).splitlines()) <= 3


@pytest.mark.fault(
    "data",
    "a training file that grows, shrinks or is replaced while it is read",
    "refused with its name; nothing of it is kept as prepared data",
)
@pytest.mark.parametrize("change", ["grows", "shrinks", "is replaced"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_changes(
    change: str,
    streaming: bool,
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 300)
    options.train_file, options.streaming = str(path), streaming

    def find_and_change(options: Options) -> tuple[list[Source], dict[str, Source]]:
        found = find_sources(options)
        for source in found[0]:
            changing.append(iter(read(source)))
            next(changing[-1])  # it is open now
        if change == "grows":
            path.write_bytes(LINE * 301)
        elif change == "shrinks":
            os.truncate(path, len(LINE) * 100)
        else:
            path.rename(tmp_path / "old")
            path.write_bytes(LINE * 300)
        return found

    changing: list[Iterator[RawRecord]] = []
    monkeypatch.setattr("data.prepare.find_sources", find_and_change)
    with pytest.raises(OptionError, match=f"{path}: was changed while it was read\nstart again"):
        prepare_data(options, tokenizer)
    with pytest.raises(OptionError, match=f"{path}: was changed while it was read\nstart again"):
        list(changing[0])
    assert not list((tmp_path / "cache").glob("data-*/about.json"))
