"""Proves data/files/remote.py: text behind URLs is streamed as files are, from servers that may fail.

A server of HTTP runs in this process. One of S3 (moto) runs if the packages of requirements-dev.txt are installed.
"""

import functools
import http.server
import re
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from config.checks import check_data
from config.errors import OptionError
from config.options import Options
from data.ledger import differences, problems
from data.prepare import prepare_data
from data.stream import StreamingDataset
from tests.launch import train_ok
from tests.test_errors import refused
from tests.test_prepare import write
from tests.test_stream import same


class Server(http.server.ThreadingHTTPServer):
    """Serves a directory with ranges, as servers of objects do. It may fail or wait for some requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("localhost", 0), functools.partial(Handler, directory=str(folder)))
        self.sent: list[int] = []  # bytes of each answer
        self.fails, self.status, self.seconds, self.ranges, self.version = 0, 503, 0.0, True, "1"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        server = self.server
        time.sleep(server.seconds if send else 0)
        if send and server.fails:
            server.fails -= 1
            self.send_error(server.status)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        self.send_header("ETag", f'"{server.version}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if send:
            server.sent.append(len(part))
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.stream.LANE_CHUNK", 2000)
    monkeypatch.setattr("data.files.remote.WAITS", (0.01, 0.01))


@pytest.fixture
def folder(documents: list[str], tmp_path: Path) -> Path:
    for name, texts in {"a.jsonl": documents[:80], "b.jsonl.gz": documents[80:120], "c.parquet": documents}.items():
        write(tmp_path / "text" / name, texts)
    (tmp_path / "text" / "d.txt").write_text("\n".join(documents[:40]))
    return tmp_path / "text"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


NAMES = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")


def stream_of(train_file: str, tokenizer: PreTrainedTokenizerBase, cache: Path) -> StreamingDataset:
    options = Options(train_file=train_file, streaming=True, max_steps=1, block_size=32, data_cache_dir=str(cache))
    check_data(options)
    train = prepare_data(options, tokenizer).train
    assert isinstance(train, StreamingDataset)
    return train.shard(0, 1, 4, [])


def urls(server: Server, *names: str) -> str:
    return ",".join(f"http://localhost:{server.server_port}/{name}" for name in names)


def test_the_sequences_are_those_of_files(
    server: Server, folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Lines, a compressed file, row groups and a text; and a stream reads only ranges of a file that can be cut."""
    remote = stream_of(urls(server, *NAMES), tokenizer, tmp_path)
    local = stream_of(",".join(str(folder / name) for name in NAMES), tokenizer, tmp_path)
    assert same(list(islice(remote, 400)), list(islice(local, 400)))
    (folder / "large.jsonl").write_bytes((folder / "a.jsonl").read_bytes() * 50)
    lines = stream_of(urls(server, "large.jsonl"), tokenizer, tmp_path)
    server.sent.clear()
    list(islice(lines, 4))
    assert 0 < sum(server.sent) < (folder / "large.jsonl").stat().st_size / 4


def test_other_file_systems(folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A directory and a pattern, on a file system without requests."""
    memory = fsspec.filesystem("memory")
    for name in ("b/a.jsonl", "b/deep/c.parquet", "b/_tmp/a.jsonl", "b/tokenizer.json", "b/x.bin"):
        source = folder / Path(name).name
        memory.pipe(f"/{name}", source.read_bytes() if source.exists() else b"{}")
    local = stream_of(f"{folder}/a.jsonl,{folder}/c.parquet", tokenizer, tmp_path)
    expected = list(islice(local, 100))
    for value in ("memory://b", "memory://b/a.jsonl,memory://b/deep/*.parquet"):
        stream = stream_of(value, tokenizer, tmp_path)
        assert [file.name for file in stream.texts[0].source.files] == ["a.jsonl", "c.parquet"]
        assert same(list(islice(stream, 100)), expected)


@pytest.mark.fault(
    "data",
    "text behind a URL: a server that fails once, is slow, refuses, lacks the file, ignores ranges or is not there",
    "asked again and trained on, or refused with the URL and a remedy after a limited time",
)
def test_servers_that_fail(
    server: Server, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urls(server, "a.jsonl")
    expected = list(islice(stream_of(url, tokenizer, tmp_path), 8))
    server.fails = 2
    assert same(list(islice(stream_of(url, tokenizer, tmp_path), 8)), expected)
    stream = stream_of(url, tokenizer, tmp_path)
    server.fails = 2
    assert same(list(islice(stream, 8)), expected)
    server.fails = 9
    with pytest.raises(OptionError, match=rf"{url}: cannot be read as .jsonl: no answer after 3 attempts: .*503"):
        next(iter(stream))
    server.fails, server.status = 9, 403
    with pytest.raises(OptionError, match=rf"{url}: cannot be read as .jsonl: 403"):
        next(iter(stream))
    server.fails, server.ranges = 0, False
    with pytest.raises(OptionError, match=rf"{url}: .*the server sent [\d,]+ bytes for a range of"):
        next(iter(stream))
    server.ranges, server.version = True, "2"
    with pytest.raises(OptionError, match=f"{url}: was changed while it was read"):
        next(iter(stream))
    server.seconds = 3
    monkeypatch.setattr("data.files.remote.TIMEOUT", 1)
    with pytest.raises(OptionError, match=rf"{url}: .*no answer after 3 attempts: TimeoutError.*\nlook at the network"):
        stream_of(url, tokenizer, tmp_path)
    server.seconds = 0
    with pytest.raises(OptionError, match=r"nothing.jsonl: there is no such file; correct the URL"):
        stream_of(urls(server, "nothing.jsonl"), tokenizer, tmp_path)
    with pytest.raises(OptionError, match=r"localhost:1/a.jsonl: no answer after 3 attempts: .*\ncheck the URL"):
        stream_of("http://localhost:1/a.jsonl", tokenizer, tmp_path)


def test_what_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs that are not streamed, protocols without their package, and credentials, which are not repeated."""
    for option in ("train_file", "train_mixture", "validation_file"):
        options = Options(train_file="a.jsonl" if option == "validation_file" else None)
        setattr(options, option, "s3://bucket/a.jsonl=1")
        with pytest.raises(OptionError, match=rf"{option} s3://bucket/a.jsonl.*: prepared data is made .*\n.*download"):
            check_data(options)
    for url in (
        "s3://key:secret@bucket/a.jsonl",
        "https://server/a.jsonl?X-Amz-Signature=secret",
        "https://secret@x/a",
    ):
        with pytest.raises(OptionError, match="may hold credentials") as found:
            stream_of(url, tokenizer, tmp_path)
        assert "secret" not in str(found.value)
        assert "secret" not in refused("--train_file", url, "--streaming", "--max_steps", 1, "--output_dir", tmp_path)
    with pytest.raises(OptionError, match=r"train_file nosuch://a/b.jsonl: Protocol not known"):
        stream_of("nosuch://a/b.jsonl", tokenizer, tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(OptionError, match=r"gs:// needs a package that is not installed\n.*pip install gcsfs"):
        stream_of("gs://bucket/b.jsonl", tokenizer, tmp_path)


@pytest.mark.slow
def test_training(tiny: list[object], server: Server, folder: Path, tmp_path: Path) -> None:
    """Two ranks with loader processes train on a server's text as one rank does on files, and resume."""
    options = ["--streaming", "--ledger", "--global_batch_size", 8, "--per_device_train_batch_size", 2]
    options += ["--lr_scheduler_type", "constant_with_warmup", "--validation_split_percentage", 0]
    files = ["--train_file", ",".join(str(folder / name) for name in NAMES)]
    train_ok(1, *tiny, *files, *options, "--max_steps", 9, "--output_dir", tmp_path / "files")
    for ranks, steps in ((2, 4), (1, 9)):
        more = ["--train_file", urls(server, *NAMES), "--resume_from_checkpoint", "auto", "--max_steps", steps]
        train_ok(ranks, *tiny, *options, *more, "--dataloader_num_workers", 1, "--output_dir", tmp_path / "urls")
    assert problems(tmp_path / "files") == problems(tmp_path / "urls") == []
    assert differences(tmp_path / "files", tmp_path / "urls") == []


@pytest.mark.slow
def test_two_ranks_read_what_one_reads(tiny: list[object], server: Server, folder: Path, tmp_path: Path) -> None:
    """Together, because each reads its half: counted by the server."""
    (folder / "large.jsonl").write_bytes((folder / "a.jsonl").read_bytes() * 100)
    options = [*tiny, "--train_file", urls(server, "large.jsonl"), "--streaming", "--global_batch_size", 16]
    options += ["--per_device_train_batch_size", 4, "--max_steps", 4, "--validation_split_percentage", 0]
    sent = []
    for ranks in (1, 2):
        server.sent.clear()
        train_ok(ranks, *options, "--dataloader_num_workers", 0, "--output_dir", tmp_path / str(ranks))
        sent.append(sum(server.sent))
    lines = (folder / "large.jsonl").stat().st_size
    assert lines / 5 < sent[0] < lines / 2
    assert sent[0] < sent[1] < 1.4 * sent[0]  # each rank also reads the beginning of the file, to see its columns


def test_s3(folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of S3: a bucket, a file in it, what it does not have, and no credentials."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "hush",
    }
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("bucket")
        for name in NAMES:
            bucket.put(str(folder / name), f"bucket/text/{name}")
        local = stream_of(",".join(str(folder / name) for name in NAMES), tokenizer, tmp_path)
        for value in ("s3://bucket/text/*", ",".join(f"s3://bucket/text/{name}" for name in NAMES)):
            assert same(list(islice(stream_of(value, tokenizer, tmp_path), 100)), list(islice(local, 100)))
        with pytest.raises(OptionError, match=r"s3://bucket/nothing.jsonl: there is no such file"):
            stream_of("s3://bucket/nothing.jsonl", tokenizer, tmp_path)
    finally:
        server.stop()
