"""Files of text with a record that is too large, or that change or are no files: read with a bound, or refused."""

import gzip
import multiprocessing
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from data.records import Source, parsed, read

GIB = 1 << 30
ROOM = 3 * GIB // 4  # bytes of address space that reading may take: a line of 64 MiB, but never the whole record


def repeated(compress: Callable[[bytes], bytes], begin: bytes, content: bytes, times: int) -> bytes:
    """Compressed frames one after the other, as `cat` joins them: `begin`, and then `content` many times."""
    return compress(begin) + compress(content) * times


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)  # type: ignore[no-any-return]


def sparse(path: Path, begin: bytes) -> None:
    """A file of 8 GiB that takes no room on the disk: `begin`, and zero bytes."""
    path.write_bytes(begin)
    os.truncate(path, 8 * GIB)


WORDS, TIMES = b"a word " * (1 << 20), 1171  # together more than 8 GiB

HUGE: dict[str, Callable[[Path], object]] = {
    "lines.jsonl.gz": lambda path: path.write_bytes(repeated(gzip.compress, b'{"text": "', WORDS, TIMES)),
    "lines.jsonl.zst": lambda path: path.write_bytes(repeated(zstd, b'{"text": "', WORDS, TIMES)),
    "array.json.gz": lambda path: path.write_bytes(repeated(gzip.compress, b'[{"text": "', WORDS, TIMES)),
    "numbers.json.zst": lambda path: path.write_bytes(repeated(zstd, b'[{"text": [1', b",1" * (1 << 22), 1024)),
    "deep.jsonl.zst": lambda path: path.write_bytes(repeated(zstd, b'{"text": ', b"[" * (1 << 23), 1024)),
    "cell.csv.gz": lambda path: path.write_bytes(repeated(gzip.compress, b'text\n"', WORDS, TIMES)),
    "lines-in-a-cell.csv.zst": lambda path: path.write_bytes(repeated(zstd, b'text\n"', b"one\n" * (1 << 21), 1024)),
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
