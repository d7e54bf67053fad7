"""Text files, read with a bound: no line is held that is larger than a limit, whatever a file decompresses to."""

import codecs
import io
from collections.abc import Generator
from typing import Any, cast

import pyarrow

from config.errors import OptionError
from data.files.remote import File, Remote, RemoteFile

BLOCK = 1 << 20  # bytes that are read at a time

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def lines_of(path: File, offset: int, lines: int | None, limit: int) -> Generator[tuple[bytes, int], None, None]:
    """The lines of a file from byte `offset` of its text on, and the byte where each ends. `lines` come before them.

    Raises OptionError for a line of more than `limit` bytes, by its number, or by its first byte if `lines` is None.
    """
    file, offset = open_text(path, offset)
    with file:
        while line := file.readline(limit + 1):
            lines = None if lines is None else lines + 1
            if len(line) > limit:
                check_size(f"{path}: line {lines or f'at byte {offset:,}'}", len(line), limit)
            offset += len(line)
            yield line, offset


def lines_between(
    path: File, begin: int, end: int, lines: int | None, limit: int
) -> Generator[tuple[bytes, int], None, None]:
    """The lines from the first one that begins in bytes `begin` to `end` on, and the byte where each ends.

    So each line of a file begins in one of the ranges that it is cut into, and no process has to read another range to
    find it. Reads a range at once, and what follows it only if the caller goes on. No file is open meanwhile. `lines`
    come before the first one, for messages, if they are known.
    """
    file, offset = open_text(path, max(0, begin - 1))
    with file:
        data = io.BytesIO(file.read(max(0, end - offset)))
    if begin:
        offset += len(data.readline())  # the end of a line that begins earlier, or only its line feed
        if offset >= end:
            return
    while offset < end and (line := data.readline()).endswith(b"\n"):
        offset += len(line)
        lines = None if lines is None else lines + 1
        if len(line) > limit:
            check_size(f"{path}: line {lines or f'at byte {offset - len(line):,}'}", len(line), limit)
        yield line, offset
    yield from lines_of(path, offset, lines, limit)


def open_text(path: File, offset: int) -> tuple[io.BufferedReader, int]:
    """The text of a file, open at byte `offset` of it, or after a UTF-8 BOM. Also returns the byte that comes next.

    In a compressed file, that costs reading up to there. `datasets` needs pyarrow, which reads both compressions;
    Python itself knows zstd from 3.14 on. Raises OptionError for a file that begins in UTF-16 or UTF-32, or with a NUL
    byte, as no text in UTF-8 does.
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        file = path.open() if isinstance(path, Remote) else open(path, "rb")  # noqa: SIM115, because the caller closes it
        file.seek(offset)
    else:
        packed = io.BufferedReader(RemoteFile(path), BLOCK) if isinstance(path, Remote) else str(path)
        file = io.BufferedReader(cast(Any, pyarrow.input_stream(packed, compression=compression)), BLOCK)
        for size in [BLOCK] * (offset // BLOCK) + [offset % BLOCK]:
            file.read(size)
    if offset == 0:
        begin = file.peek(4)
        if begin.startswith(UTF_16) or b"\0" in begin[:4]:
            text(path, begin, 0)
        if begin.startswith(codecs.BOM_UTF8):
            offset = len(file.read(len(codecs.BOM_UTF8)))
    return file, offset


def check_size(place: str, size: int, limit: int) -> None:
    """Raise OptionError if a record, or a line, has more than `limit` bytes."""
    if size > limit:
        raise OptionError(
            f"max_record_bytes {limit}: {place} has more bytes than that\nsplit or remove it, or pass a larger "
            "--max_record_bytes: tokenizing a text takes about 150 times its size in memory"
        )


def text(path: File, raw: bytes, offset: int) -> str:
    """The text of bytes that begin at byte `offset` of a file. Raises OptionError if they are no text in UTF-8."""
    try:
        decoded = raw.decode()
        position = decoded.find("\0")
        if position < 0:
            return decoded
        position = len(decoded[:position].encode())
    except UnicodeDecodeError as error:
        position = error.start
    wide = offset == 0 and (raw.startswith(UTF_16) or b"\0" in raw[:2])
    problem = "is in UTF-16, not in UTF-8" if wide else f"byte {offset + position:,} is {raw[position]:#04x}, so it is "
    if not wide:
        problem += "no text" if raw[position] == 0 else "not in UTF-8"
    raise OptionError(
        f"{path}: {problem}\nconvert a text from the encoding that it has, such as UTF-16, LATIN1 or GB18030:\n"
        f"iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8 {path.name} > converted-{path.name}"
    )
