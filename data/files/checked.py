"""Files whose bytes are checked when they are read: each block of 64 KiB has a checksum (XXH3, 64 bits).

A disk, a copy or another program may change a byte of prepared data. Nothing would fail: the run would train on it. So
every read verifies the blocks that it touches, in each process that reads them. A read costs its blocks and nothing
else, whatever the size of the file. Nothing is memory-mapped, because a process that reads a mapped file that became
shorter is killed by SIGBUS, without a message.

Costs on one core of a server of 2026: 18 GB/s to verify (4 GB/s for zlib.crc32, 1.7 GB/s for SHA-256), and 8 bytes of
checksums for each block, which a process holds: 128 MiB for a tebibyte.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from config.errors import OptionError

BLOCK = 1 << 16  # bytes; Linux reads about as many at once, so that a sequence is not slower to read from a disk

VERIFIED_AT_START = 1 << 28  # bytes; a larger file is verified only where it is read

SYNCED = 1 << 24  # bytes; smaller files are prepared again within seconds if the machine loses its power

OPEN_FILES = 100  # that a process holds open at a time; a mixture has six for each of its sources


class DamagedError(OptionError):
    """A file of prepared data does not have the bytes that were written, or is missing."""


@dataclass(frozen=True)
class Content:
    """What was written to a file."""

    bytes: int
    sha256: str
    checksums: str  # the checksum of the checksums of its blocks


class CheckedWriter:
    """Writes a file, and beside it the checksums of its blocks. The `size` first bytes stay if the file exists."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Raises DamagedError if the file has fewer than `size` bytes."""
        self.path, self.size, self.checksums = path, 0, bytearray()
        self.whole, self.block = hashlib.sha256(), xxhash.xxh3_64()
        self.file = open(path, "r+b" if size else "wb")  # noqa: SIM115, because `close` closes it
        while self.size < size:
            if not (data := self.file.read(min(16 * BLOCK, size - self.size))):
                raise _damaged(path, f"has {self.size:,} bytes, not {size:,}")
            self._count(data)
        self.file.truncate()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._count(data)

    def _count(self, data: bytes) -> None:
        self.whole.update(data)
        left = memoryview(data)
        while left:
            part, left = left[: (room := BLOCK - self.size % BLOCK)], left[room:]
            self.block.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._end_block()

    def _end_block(self) -> None:
        self.checksums += self.block.intdigest().to_bytes(8, "little")
        self.block.reset()

    def sha256(self) -> str:
        """The SHA-256 of all that was written so far."""
        return self.whole.hexdigest()

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> Content:
        """Write the checksums. Waits until a file that takes long to write again is on the disk."""
        if self.size % BLOCK:
            self._end_block()
        if self.size > SYNCED:
            self.sync()
        self.file.close()
        _beside(self.path).write_bytes(self.checksums)
        return Content(self.size, self.sha256(), _checksum(self.checksums))


class CheckedArray:
    """The numbers of a file that a CheckedWriter wrote, in rows of `shape`. Slices are read from the disk, verified."""

    def __init__(self, path: Path, dtype: type, content: Content, shape: tuple[int, ...] = ()) -> None:
        """Raises DamagedError if the file or its checksums are not those of `content`."""
        self.path, self.dtype, self.content, self.shape = path, np.dtype(dtype), content, shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        try:
            table, status = _beside(path).read_bytes(), path.stat()
        except OSError as error:
            raise _damaged(Path(error.filename), str(error.strerror)) from error
        self.identity, size = (status.st_dev, status.st_ino), status.st_size
        if _checksum(table) != content.checksums:
            raise _damaged(_beside(path), "is not what was written")
        if size != content.bytes:
            raise _damaged(path, f"has {size:,} bytes, not {content.bytes:,}")
        self.checksums: NDArray[np.uint64] = np.frombuffer(table, "<u8")

    def __len__(self) -> int:
        return self.content.bytes // self.row_bytes

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """A read-only array of `rows`, a slice without a step. Raises DamagedError."""
        first, end, _ = rows.indices(len(self))
        end = max(first, end)
        data = self._read(first * self.row_bytes, end * self.row_bytes)
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape)

    def verify(self) -> None:
        """Read and verify all blocks. Raises DamagedError."""
        for first in range(0, self.content.bytes, 16 * BLOCK):
            self._read(first, min(first + 16 * BLOCK, self.content.bytes))

    def _read(self, first: int, end: int) -> memoryview:
        """The bytes from `first` to `end`, after all blocks that they are in were verified."""
        start, stop = first // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, self.content.bytes)
        try:
            file = _opened(self.path, self.identity)
            data = memoryview(os.pread(file.fileno(), stop - start, start) if stop > start else b"")
        except OSError as error:
            raise _damaged(self.path, error.strerror or str(error)) from error
        for offset in range(start, stop, BLOCK):
            block = data[offset - start : offset - start + BLOCK]
            if xxhash.xxh3_64_intdigest(block) != self.checksums[offset // BLOCK]:
                where = f"bytes {offset:,} to {min(offset + BLOCK, stop):,}"
                raise _damaged(self.path, f"{where} are not those that were written")
        return data[first - start : end - start]


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Write a value as JSON, with a checksum in it. A process that is killed leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    checked = value | {"checksum": _checksum(json.dumps(value, sort_keys=True).encode())}
    with open(temporary, "w") as file:
        json.dump(checked, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checked(path: Path) -> dict[str, Any]:
    """A value that `write_checked` wrote. Raises DamagedError if the file is missing or was changed."""
    try:
        value = json.loads(path.read_bytes())
        checksum = value.pop("checksum")
        same = checksum == _checksum(json.dumps(value, sort_keys=True).encode())
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        same = False
    if not same:
        raise _damaged(path, "is not what was written")
    return dict(value)


@lru_cache(OPEN_FILES)
def _opened(path: Path, identity: tuple[int, int]) -> FileIO:
    """The file, open for reading. A file that has replaced it has another `identity` (device, inode).

    Processes that were forked share the open file, which pread allows.
    """
    return open(path, "rb", buffering=0)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")


def _checksum(data: bytes | bytearray) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _damaged(path: Path, problem: str) -> DamagedError:
    return DamagedError(f"{path}: {problem}")
