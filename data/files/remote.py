"""Files behind URLs that fsspec knows, such as s3://, hf:// and https://, read in ranges of bytes.

Only the ranges that are asked for are sent. A request that fails or takes too long is sent again a few times. The
credentials are those that the package of the protocol finds in the environment or in its files. None is in a URL,
because URLs are printed and saved.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from config.errors import OptionError, first_line, install

WAITS = (1, 2, 4, 8)  # seconds before a request is sent again

TIMEOUT = 60  # seconds that a request may take; 1 MiB takes less on any network that can feed a GPU

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}

# What says that a file has changed, of the facts that a server gives: a hash, or a time. Listings give the same hash.
HASHES = ("ETag", "etag", "blob_id", "md5Hash")
TIMES = ("mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class Remote:
    """A file behind a URL, as it was when it was found. It has what readers use of a Path."""

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.url).suffixes

    def __str__(self) -> str:
        return self.url

    def status(self) -> tuple[str, str, int, str]:
        """What changes with the content now. Raises OSError."""
        return "", *_facts(self.url, _ask(self.url, lambda files, path: _call(files, "info", path)))

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(RemoteFile(self), 1 << 15)  # what is read of a record beyond its part


File = Path | Remote


class RemoteFile(io.RawIOBase):
    """A file behind a URL, open for reading. Each read is one request."""

    def __init__(self, remote: Remote) -> None:
        self.remote, self.position = remote, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.remote.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        begin, end = self.position, min(self.position + len(buffer), self.remote.size)
        if begin >= end:
            return 0

        def read(files: Any, path: str) -> bytes:
            data: bytes = _call(files, "cat_file", path, start=begin, end=end)
            if len(data) != end - begin:
                raise OSError(f"the server sent {len(data):,} bytes for a range of {end - begin:,}")
            return data

        buffer[: end - begin] = _ask(self.remote.url, read)
        self.position = end
        return end - begin


def is_url(name: str) -> bool:
    return "://" in name


def find_remote(option: str, url: str) -> list[Remote]:
    """The file at a URL, or all files of a directory or pattern there. Raises OptionError."""

    def find(files: Any, path: str) -> list[Remote]:
        if "*" in path:
            infos = files.glob(path, detail=True)
        elif (info := _call(files, "info", path))["type"] == "directory":
            infos = files.find(path, detail=True)
        else:
            return [Remote(*_facts(url, info))]
        infos = [infos[name] for name in sorted(infos) if infos[name]["type"] == "file"]
        infos = [info if set(HASHES) & info.keys() else _call(files, "info", info["name"]) for info in infos]
        return [Remote(*_facts(files.unstrip_protocol(info["name"]), info)) for info in infos]

    scheme = url.partition("://")[0]
    try:
        return _ask(url, find)
    except ImportError as error:
        package = PACKAGES.get(scheme.removesuffix("s"), PACKAGES.get(scheme))
        remedy = install(package) if package else f"install it: {first_line(error)}"
        raise OptionError(f"{option} {url}: {scheme}:// needs a package that is not installed\n{remedy}") from error
    except ValueError as error:
        raise OptionError(f"{option} {url}: {first_line(error)}\npass a path, or s3://BUCKET/FILE") from error
    except FileNotFoundError as error:
        raise OptionError(f"{option} {url}: there is no such file; correct the URL") from error
    except PermissionError as error:
        raise OptionError(
            f"{option} {url}: the server refuses access: {first_line(error)}\nset the credentials in the environment "
            "or in the files of its package, such as AWS_PROFILE for s3:// or HF_TOKEN for hf://"
        ) from error
    except OSError as error:
        raise OptionError(f"{option} {url}: {first_line(error)}\ncheck the URL, the network and the server") from error


def _facts(url: str, info: dict[str, Any]) -> tuple[str, int, str]:
    """The URL, size and version of a file. Raises OSError if the server does not say its size."""
    if info.get("size") is None:
        raise OSError("the server does not say the size of the file, so no range of it can be read")
    return url, int(info["size"]), next((str(info[name]) for name in HASHES + TIMES if info.get(name)), "")


def _ask(url: str, request: Callable[[Any, str], Any]) -> Any:
    """The answer of `request`, which gets the file system of a URL and the path in it. Raises OSError.

    Other errors of packages become OSErrors after the last attempt. A request that is refused is not sent again.
    """
    import fsspec  # only here: most runs read local files

    for wait in (*WAITS, None):
        # A forked loader process gets a file system of its own. Listings may be old, so none is kept.
        try:
            files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
            return request(files, path)
        except Exception as error:
            cause = error.__cause__ or error  # of a server of HTTP, fsspec reports any error as a missing file
            status = getattr(cause, "status", 0 if error is not cause and isinstance(cause, OSError) else 404)
            if status in (401, 403) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise PermissionError(first_line(cause)) from error
            if status == 404 and isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError):
                raise
            if wait is None:
                message = f"no answer after {len(WAITS) + 1} attempts: {type(cause).__name__}: {first_line(cause)}"
                raise OSError(message) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _call(files: Any, name: str, *arguments: Any, **settings: Any) -> Any:
    """A request of a file system, with a limit of time if it has one of its own for none."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(files, AsyncFileSystem):
        return sync(files.loop, getattr(files, f"_{name}"), *arguments, timeout=TIMEOUT, **settings)
    return getattr(files, name)(*arguments, **settings)
