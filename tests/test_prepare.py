"""Proves data/cache.py, data/prepare.py, data/sources.py and data/records.py: all sources, in parallel, resumed."""

import copy
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import data.cache
from compare.preparation import generate
from compare.preparation import prepare as measured
from config.errors import OptionError
from config.options import Options
from data.cache import cache_key
from data.packing import Packing
from data.prepare import main, prepare_data
from data.records import START, Position, RawRecord, read
from data.sources import Source, _hash, find_sources
from data.tokens import Rendering
from tests.launch import ROOT
from tests.test_data import expected_tokens, tokens_of


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        data_cache_dir=str(tmp_path / "cache"),
        block_size=32,
        validation_split_percentage=0,
        packing="none",
        preprocessing_num_workers=1,
    )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small text a large one: a dozen chunks, and progress written after each."""
    monkeypatch.setattr("data.cache.CHUNK", 20_000)
    monkeypatch.setattr("data.cache.SYNC", 0.0)


def write(path: Path, documents: Sequence[object]) -> Path:
    """Write `documents` in the format of the name of `path`. A .txt or .md file holds them all as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    match path.suffix:
        case ".gz":
            half = len(lines) // 2
            path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))  # as `cat a.gz b.gz` gives
        case ".zst":
            with pyarrow.output_stream(str(path), compression="zstd") as file:
                file.write(lines)
        case ".parquet":
            datasets.Dataset.from_dict({"text": list(documents)}).to_parquet(str(path), batch_size=64)
        case ".txt" | ".md":
            path.write_text("\n".join(map(str, documents)))
        case _:
            path.write_bytes(lines)
    return path


def test_files_directories_and_globs(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A source may be many files of many kinds, in the order of their names or of a list."""
    names = ("a.jsonl", "b.jsonl.gz", "c/d.jsonl.zst", "c/e.parquet", "f.json")
    files = [write(tmp_path / "text" / name, documents[i * 40 : i * 40 + 40]) for i, name in enumerate(names)]
    (tmp_path / "text" / "notes.md").write_text("not a document")
    expected = expected_tokens(tokenizer, documents)
    monkeypatch.chdir(tmp_path)
    for value in (str(tmp_path / "text"), "text/**/*.*[lntz]", ",".join(map(str, files))):
        options.train_file = value
        assert tokens_of(prepare_data(options, tokenizer).train) == expected
    options.train_file = f"{files[1]},{files[0]}"
    assert tokens_of(prepare_data(options, tokenizer).train) == expected_tokens(
        tokenizer, documents[40:80] + documents[:40]
    )


def test_source_files(
    options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Source code and Markdown are documents. In a directory, they are data only without files of data beside them."""
    texts = {"a.py": "def f():\n\treturn 1\n", "b/README.md": "# Title\n", "b/run.SH": "ls\n", "c.rs": "fn main() {}"}
    for name, text in texts.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text)
    (tmp_path / "code/Makefile").write_text("all:\n")
    options.train_file = str(tmp_path / "code")
    assert tokens_of(prepare_data(options, tokenizer).train) == expected_tokens(tokenizer, list(texts.values()))
    assert "reads 4 files and leaves out 1 (Makefile)" in capsys.readouterr().err
    options.train_file = f"{tmp_path}/code/a.py,{tmp_path}/code/b/README.md"
    two = expected_tokens(tokenizer, [texts["a.py"], texts["b/README.md"]])
    assert tokens_of(prepare_data(options, tokenizer).train) == two
    options.train_file = f"{tmp_path}/code/**/*.rs"
    assert tokens_of(prepare_data(options, tokenizer).train) == expected_tokens(tokenizer, [texts["c.rs"]])
    write(tmp_path / "code" / "data.jsonl", ["one", "two"])
    options.train_file = str(tmp_path / "code")
    assert tokens_of(prepare_data(options, tokenizer).train) == expected_tokens(tokenizer, ["one", "two"])
    assert "reads 1 files and leaves out 5 (Makefile, a.py, b/README.md, ...)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.md"])
def test_reading_starts_anywhere(options: Options, documents: list[str], tmp_path: Path, name: str) -> None:
    """The records after a position are the same, whether reading started there or at the beginning."""
    write(tmp_path / "text" / name, [text + "\nx" * 600 for text in documents])
    write(tmp_path / "text" / f"b{name}", documents[:2])
    options.train_file = str(tmp_path / "text")
    (source,), _ = find_sources(options)
    records = list(read(source))
    assert len(records) > 5
    for index in range(0, len(records), 7):
        assert list(read(source, records[index].after)) == records[index + 1 :]
    assert list(read(source, records[-1].after)) == []


@pytest.mark.fault(
    "data",
    "a record whose text is null or has another type, in a line, a compressed file, a row of Parquet",
    "refused with its file and line or row; nothing stays in the cache",
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("value", [None, 3])
def test_a_row_without_text(
    options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, value: object
) -> None:
    """A null or wrongly typed text is an error that names file and record, and leaves nothing in the cache."""
    path, texts = tmp_path / name, ["a"] * 150
    write(path, [*texts, value] if value is None or path.suffix != ".parquet" else [value])
    row = 1 if value and path.suffix == ".parquet" else 151  # a column of .parquet has one type
    place = f"{path}: row {row - 1}" if path.suffix == ".parquet" else f"{path}: line {row}"
    options.train_file = str(path)
    with pytest.raises(OptionError, match=f"{place} has no text in column text: "):
        prepare_data(options, tokenizer)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_damaged_files(options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A file that ends too early, or is not what its name says, is an error with its name."""
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        path = write(tmp_path / name, [f"{index} words " * 50 for index in range(500)])
        path.write_bytes(path.read_bytes()[:-50])
        options.train_file = str(path)
        with pytest.raises(OptionError, match=f"{path}: cannot be read as {path.suffix}: "):
            prepare_data(options, tokenizer)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    options.train_file = str(path)
    with pytest.raises(OptionError, match=f"{path}: line 2: cannot be read as JSON: "):
        prepare_data(options, tokenizer)
    options.train_file = f"{tmp_path}/none/*.jsonl"
    with pytest.raises(OptionError, match=r"no file there has one of the suffixes \.txt, "):
        prepare_data(options, tokenizer)


@pytest.mark.fault(
    "data",
    "a document of 100 times the sequence length",
    "cut into sequences, and none of its tokens is lost",
)
@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_a_long_document(options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, packing: str) -> None:
    """A document of 100 times block_size is cut into sequences, and none of its tokens is lost."""
    text = " ".join(f"{number}" for number in range(2000))
    expected = expected_tokens(tokenizer, [text])
    assert len(expected) > 100 * 32
    options.train_file, options.packing = str(write(tmp_path / "long.jsonl", [text])), packing  # type: ignore[assignment]
    prepared = prepare_data(options, tokenizer)
    dropped = prepared.counts["train"].dropped_tokens
    assert dropped == (len(expected) % 32 if packing == "concat" else 0)
    segments = sorted(map(tuple, prepared.train.segments[:].tolist()))  # type: ignore[union-attr]
    assert segments[0][0] == 0
    assert [end for _, end in segments[:-1]] == [start for start, _ in segments[1:]]
    assert segments[-1][1] == len(expected) - dropped
    assert sorted(tokens_of(prepared.train)) == sorted(expected[: len(expected) - dropped])


def test_workers_do_not_matter(
    options: Options, tokenizer: PreTrainedTokenizerBase, train_file: Path, tmp_path: Path, small_chunks: None
) -> None:
    """Sequences and fingerprint do not depend on the number of processes."""
    options.train_file = str(train_file)
    prepared = []
    for workers in (1, 2, 3):
        options.preprocessing_num_workers, options.data_cache_dir = workers, str(tmp_path / f"cache-{workers}")
        prepared.append(prepare_data(options, tokenizer))
    assert prepared[0].fingerprint == prepared[1].fingerprint == prepared[2].fingerprint
    assert tokens_of(prepared[0].train) == tokens_of(prepared[2].train)


def test_the_first_bad_row_is_named(
    options: Options, tokenizer: PreTrainedTokenizerBase, documents: list[str], tmp_path: Path, small_chunks: None
) -> None:
    """The error names the first bad record, even if another process meets another one earlier."""
    path = write(tmp_path / "text.jsonl", documents)
    path.write_text(path.read_text() + '{"text": 1}\n' + path.read_text() + '{"text": 2}\n' * 9)
    options.train_file, options.preprocessing_num_workers = str(path), 3
    with pytest.raises(OptionError, match=f"{path}: line 201 has no text in column text: 1"):
        prepare_data(options, tokenizer)


def slowly(options: Options, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prepare in a process that a test will kill. Reading is slow enough for that."""

    def read_slowly(source: Source, start: Position = START) -> Iterator[RawRecord]:
        for record in read(source, start):
            time.sleep(0.05)
            yield record

    data.cache.read = read_slowly
    prepare_data(options, tokenizer)


def runs(process: str) -> bool:
    """Whether a process still runs. An ended process may remain as a zombie until its parent waits for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_killed_and_gone_on_with(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    train_file: Path,
    tmp_path: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After SIGKILL, the workers end, the next preparation resumes where it stopped, and the sequences are the same."""
    options.train_file, options.preprocessing_num_workers = str(train_file), 2
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(options, tokenizer))
    process.start()
    deadline = time.monotonic() + 60
    while not (found := list((tmp_path / "cache").glob("data-*.partial/progress.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    process.kill()
    process.join()
    killed_at = time.monotonic()
    while any(runs(worker) for worker in workers):
        assert time.monotonic() < killed_at + 5
        time.sleep(0.01)
    tokens, records, _, after, _ = json.loads(found[0].read_text())["done"]
    assert tokens > records > 0
    starts: list[Position] = []

    def read_noting(source: Source, start: Position = START) -> Iterator[RawRecord]:
        starts.append(start)
        return read(source, start)

    for module in ("data.prepare", "data.cache"):
        monkeypatch.setattr(f"{module}.read", read_noting)
    gone_on_with = prepare_data(options, tokenizer)
    assert starts == [START, after]  # the first is a look at the first record
    assert not list((tmp_path / "cache").glob("*.partial"))
    options.data_cache_dir = str(tmp_path / "other")
    assert prepare_data(options, tokenizer).fingerprint == gone_on_with.fingerprint


def test_abandoned_preparations_are_removed(
    options: Options, tokenizer: PreTrainedTokenizerBase, train_file: Path, tmp_path: Path
) -> None:
    """An interrupted preparation is removed a week after its last change."""
    options.train_file = str(train_file)
    for name, age in (("data-old.partial", 8), ("data-new.partial", 6)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        path = tmp_path / "cache" / name / "tokens.bin"
        path.touch()
        then = time.time() - age * 24 * 3600
        for entry in (path, path.parent):
            os.utime(entry, (then, then))
    prepare_data(options, tokenizer)
    assert [path.name for path in (tmp_path / "cache").glob("*.partial")] == ["data-new.partial"]


def test_files_are_hashed_once(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    train_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file with an unchanged status is not read again. A change is seen, even if its time is set back."""
    path = tmp_path / "text.jsonl"
    path.write_bytes(train_file.read_bytes())
    options.train_file = str(path)
    hashed: list[Path] = []
    hash_files = _hash

    def hash_noting(files: list[Path]) -> str:
        hashed.extend(files)
        return hash_files(files)

    monkeypatch.setattr("data.sources._hash", hash_noting)
    keys = []
    for settled, expected in ((60.0, 1), (60.0, 2), (-60.0, 3), (-60.0, 3)):
        monkeypatch.setattr("data.sources.SETTLED", settled)  # at first, the file is too young to be trusted
        keys.append(find_sources(options)[0][0].key)
        assert len(hashed) == expected
    times = path.stat()
    path.write_text(path.read_text().replace("the", "eht"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    keys.append(find_sources(options)[0][0].key)
    assert len(hashed) == 4
    assert len(set(keys)) == 2
    assert keys[-1] != keys[0]


def test_the_key_holds_every_value(tokenizer: PreTrainedTokenizerBase) -> None:
    """The key changes with the content, each field of Rendering and of Packing, and the held-out percentage."""
    source = Source("text", "content")
    rendering, packing = Rendering("text", "text", 32, 0.1, tokenizer), Packing("concat", 32)
    other_template, other_eos, other_vocabulary = (copy.deepcopy(tokenizer) for _ in range(3))
    other_template.chat_template = "{{ messages }}"
    other_eos.eos_token = "a"
    other_vocabulary.add_tokens(["<new>"])
    other_bos, other_post_processor, other_normalizer, no_specials = (copy.deepcopy(tokenizer) for _ in range(4))
    other_bos.bos_token = "<eos>"  # which only a template reads
    other_post_processor.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", None, [("<eos>", 0)])
    other_normalizer.backend_tokenizer.normalizer = Lowercase()
    no_specials.split_special_tokens = True
    tokenizers = [other_template, other_eos, other_vocabulary, other_bos, other_post_processor, other_normalizer]
    changes: dict[str, list[Any]] = {"shape": ["messages"], "text_column": ["body"], "block_size": [64]}
    changes |= {"max_targetless_fraction": [0.2], "tokenizer": [*tokenizers, no_specials]}
    changes |= {"variables": [{"enable_thinking": False}], "train_on_last_turn": [True]}
    assert changes.keys() == {field.name for field in fields(Rendering)}
    renderings = [replace(rendering, **{name: value}) for name, values in changes.items() for value in values]
    packings = [replace(packing, kind="none"), replace(packing, block_size=64)]
    assert {"kind", "block_size"} == {field.name for field in fields(Packing)}
    keys = [cache_key(source, rendering, packing, 5), cache_key(source, rendering, packing, 6)]
    keys += [cache_key(replace(source, key="changed"), rendering, packing, 5)]
    keys += [cache_key(source, changed, packing, 5) for changed in renderings]
    keys += [cache_key(source, rendering, changed, 5) for changed in packings]
    assert len(set(keys)) == len(keys) == 18
    assert cache_key(replace(source, name="other", weight=2.0), rendering, packing, 5) == keys[0]


def test_the_command(tiny: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options of a run, the command prepares what the run will use. It reports errors as train.py does."""
    options = [*map(str, tiny), "--data_cache_dir", str(tmp_path)]
    main([*options, "--global_batch_size", "7"])
    assert "180 documents (text)" in capsys.readouterr().out
    assert len(list(tmp_path.glob("data-*/about.json"))) == 1
    command = [sys.executable, "-m", "data.prepare", *options, "--train_file", f"{tmp_path}/none.txt"]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == (
        f"data.prepare: error: train_file {tmp_path}/none.txt: No such file or directory; pass a readable file\n"
    )


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """Ten times the text takes at most 40 MiB more memory in the largest process."""
    costs = []
    for megabytes in (8, 80):
        generate(tmp_path / f"{megabytes}.jsonl", megabytes)
        costs.append(measured(tmp_path / f"{megabytes}.jsonl", ["--preprocessing_num_workers", "2"]))
    assert costs[1].memory < costs[0].memory + 40
