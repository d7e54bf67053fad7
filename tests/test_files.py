"""Proves data/records.py, data/sources.py and the errors of data/tokens.py: every file is read rightly, or refused."""

import codecs
import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from config.errors import OptionError
from config.options import Options
from data.loader import stream_batches
from data.prepare import prepare_data
from data.records import Part, Source, can_cut, parsed, read, read_part
from data.sequences import Sequence
from data.sources import find_sources
from data.stream import StreamingDataset
from tests.test_data import expected_tokens, tokens_of

# Texts with everything that a scanner of JSON or a reader of tables could trip over.
TEXTS = [
    "plain words",
    'a "quoted" one, with a comma; and a\ttab',
    "two\nlines\r\nor three",
    "brackets ] } [ { in a text",
    'back\\slash \\" and \\',
    "",
    "émoji 😀 and 中文",
    "\ufeffinside a text",
    "a long one " * 300,
]
RECORDS = [{"text": text, "more": str(number)} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CELLS = [f'"{text.replace(chr(34), chr(34) * 2)}",{number}\r\n' for number, text in enumerate(TEXTS)]
TABLE = "text,more\r\n" + "".join(CELLS)
BOM = codecs.BOM_UTF8

FORMS: dict[str, bytes] = {
    "lines.jsonl": LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n\r\n").encode(),
    "bom.jsonl": BOM + LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "upper.JSON": LINES.encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "unicode.json": b"\n\n " + BOM[:0] + json.dumps(RECORDS, indent=1, ensure_ascii=False).encode() + b"\n\n",
    "bom.json": BOM + json.dumps(RECORDS).encode(),
    "one-line.jsonl": json.dumps(RECORDS).encode(),
    "objects-in-lines.json": ("[\n" + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]").encode(),
    "commas-first.json": ("[" + "\n,".join(json.dumps(record, indent=3) for record in RECORDS) + "]").encode(),
    "array.json.gz": gzip.compress(json.dumps(RECORDS, indent=2).encode()),
    "table.csv": TABLE.encode(),
    "bom.CSV": BOM + TABLE.encode(),
    "table.csv.gz": gzip.compress(TABLE.encode()),
    "table.tsv": TABLE.replace(",0\r", "\t0\r").replace("text,more", "text\tmore").encode(),
}
for number in range(1, len(TEXTS)):
    FORMS["table.tsv"] = FORMS["table.tsv"].replace(f'",{number}\r'.encode(), f'"\t{number}\r'.encode())


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        data_cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "output"),
        block_size=32,
        validation_split_percentage=0,
        packing="none",
        preprocessing_num_workers=1,
    )


def source_of(path: Path, *more: Path) -> Source:
    return Source("text", "key", (path, *more))


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name: str, tmp_path: Path) -> None:
    """Each form of the same records has the same records, also if reading starts after any of them."""
    path, other = tmp_path / name, tmp_path / "other.jsonl"
    path.write_bytes(FORMS[name])
    other.write_text('{"text": "last"}')
    records = list(read(source_of(path, other)))
    assert [parsed(record) for record in records] == [*RECORDS, {"text": "last"}]
    for number, record in enumerate(records):
        assert list(read(source_of(path, other), record.after)) == records[number + 1 :]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("pretty.json", [2, 6, 10]),
        ("objects-in-lines.json", [2, 3, 4]),
        ("one-line.jsonl", [1, 1, 1]),
        ("table.csv", [2, 3, 4]),
        ("lines.jsonl", [1, 2, 3]),
    ],
)
def test_records_say_their_line(name: str, lines: list[int], tmp_path: Path) -> None:
    """The place of a record is the line where it begins, also after a text of three lines."""
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    records = list(read(source_of(path)))
    assert [record.place for record in records[:3]] == [f"{path}: line {line}" for line in lines]
    if name == "table.csv":
        assert records[3].place == f"{path}: line 7"


def test_a_bom_is_no_text(options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name, content in (("bom.txt", BOM + b"one two"), ("only.txt", BOM)):
        (tmp_path / name).write_bytes(content)
        records = list(read(source_of(tmp_path / name)))
        assert [record.content for record in records] == [{"text": content[3:].decode()}]
    options.train_file = str(tmp_path / "bom.txt")
    assert tokens_of(prepare_data(options, tokenizer).train) == expected_tokens(tokenizer, ["one two"])


REFUSED: dict[str, tuple[bytes, str]] = {
    "wide.txt": ("The text".encode("utf-16"), r"is in UTF-16, not in UTF-8\n.*\niconv -f UTF-16 -t UTF-8 wide.txt > "),
    "wide.jsonl": (LINES.encode("utf-16"), "is in UTF-16"),
    "wide-no-bom.jsonl": (LINES.encode("utf-16-le"), "is in UTF-16"),
    "wide.json": (json.dumps(RECORDS).encode("utf-16-be"), "is in UTF-16"),
    "wide.csv": (TABLE.encode("utf-16"), "is in UTF-16"),
    "latin.txt": (b"one\ntwo caf\xe9\n", r"byte 11 is 0xe9, so it is not in UTF-8\n.*LATIN1.*\niconv -f LATIN1 "),
    "latin.csv": (b"text\ncaf\xe9\n", "byte 8 is 0xe9, so it is not in UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: cannot be read as JSON: .*0xe9.*\n.*iconv -f "),
    "latin.json": (b'[{"text": "a"},\n{"text": "\xe9"}]\n', "line 2: cannot be read as JSON: .*0xe9"),
    "zeros.txt": (b"one\ntwo\0three", "byte 7 is 0x00, so it is no text"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "byte 0 is 0x89, so it is not in UTF-8"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}', "line 1: cannot be read as JSON: the key text comes twice"),
    "deep.jsonl": (
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 1: cannot be read as JSON: maximum rec",
    ),
    "long.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "line 1: cannot be read as JSON: Exceeds the limit"),
    "numbers.json": (b"[1, 2]", "must be an array of JSON objects"),
    "texts.json": (b'["a", "b"]', "line 1: '\"a\"' is here, and the file must be an array of JSON objects"),
    "cut.json": (b'[{"text": "a"},\n{"text"', "line 2: the file ends before its array does"),
    "open.json": (b'[{"text": "a"}\n', "line 1: the file ends before its array does"),
    "quote.json": (b'[{"text": "a},\n{"text": "b"}]', "line 1: a text is not closed by a quote"),
    "no-comma.json": (b'[{"text": "a"}\n{"text": "b"}]', "line 2: 'no comma' is here"),
    "comma.json": (b'[{"text": "a"},]', "line 1: ',' is here"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', r"line 2: '\[' is here"),
    "more.json": (b'[{"text": "a"}] and more', "line 1: 'and more' is here"),
    "pretty-object.json": (
        b'{\n "data": [\n{"text": "a"}]}',
        "line 1: the JSON object does not end in its line.*\n.*jq",
    ),
    "object.json": (
        b'{"version": 1, "data": [{"text": "a"}]}',
        r"key data holds 1 records\n.*jq -c '.data\[\]' object.j",
    ),
    "cells.csv": (b"text,more\na,1\nb\n", "line 3: has 1 cells, and the first line names 2"),
    "quotes.csv": (b'text,more\n"a,1\nb,2\n', "line 2: cannot be read as .csv: unexpected end of data"),
    "names.csv": (b"text,text\na,1\n", "two columns have one name: text, text"),
    "semicolons.csv": (b"text;more\na;1\n", "line 1: one column 'text;more': the separator of columns must be a comma"),
    "header.csv": (b"text\n", "has no records"),
}


def first_sequence(options: Options, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    return next(iter(prepare_data(options, tokenizer).train))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_no_form_allows(
    name: str, streaming: bool, options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A damaged file, or one in another encoding, is refused by its name, in at most three lines."""
    content, expected = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    options.train_file, options.streaming = str(path), streaming
    with pytest.raises(OptionError) as found:
        first_sequence(options, tokenizer)
    message = str(found.value)
    assert str(path) in message
    assert re.search(expected, message), message
    assert len(message.splitlines()) <= 3


BAD_RECORDS = {
    "half of a surrogate pair": ('{"text": "hi \\ud83d there"}', r"half of a surrogate pair, \\ud83d\ncorrect or rem"),
    "a number": ('{"text": 3}', "has no text in column text: 3"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_is_named(
    kind: str,
    workers: int,
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prepared by this process or by others, or streamed: the error has file and line of the record.

    tests/test_stream.py does it in a process of the loader.
    """
    monkeypatch.setattr("data.cache.CHUNK", 2000)
    line, expected = BAD_RECORDS[kind]
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one two three"}\n' * 300 + line + "\n" + '{"text": "four"}\n' * 10)
    options.train_file, options.preprocessing_num_workers = str(path), workers
    place = re.escape(f"{path}: line 301")
    with pytest.raises(OptionError, match=f"^{place}.*{expected}"):
        prepare_data(options, tokenizer)
    path.write_text('{"text": "one two three"}\n' * 9 + line + "\n")
    options.streaming, options.dataloader_num_workers, options.per_device_train_batch_size = True, 0, 20
    train = prepare_data(options, tokenizer).train
    assert isinstance(train, StreamingDataset)
    place = re.escape(f"{path}: line 10")
    with pytest.raises(OptionError, match=f"^{place}.*{expected}"):
        next(stream_batches(train.shard(0, 1, 20, []), options))


def test_any_exception_names_the_record(
    options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a template or a tokenizer raises, for a conversation or for one text of many."""
    path = tmp_path / "chat.jsonl"
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "c")]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in messages))
    options.train_file = str(path)
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template += "{% if messages[-1].content == 'c' %}{{ 1 // 0 }}{% endif %}"
    with pytest.raises(OptionError, match=re.escape(f"{path}: line 2")):
        prepare_data(options, tokenizer)

    def together_only(records: list[Any], **_: object) -> None:
        if len(records) > 1:
            raise RuntimeError("too many")

    monkeypatch.setattr("data.tokens._encode_conversations", together_only)
    with pytest.raises(OptionError, match=f"{path}: line 1 to {path}: line 2: cannot be tokenized: RuntimeError: too"):
        prepare_data(options, tokenizer)


def test_what_a_directory_leaves_out(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden files, files of other programs, checkpoints and the directories of the run are left out and counted."""
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    data = ["a.jsonl", "deep/b.json", "deep/c.TXT", "linked/d.jsonl"]
    others = [".hidden.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "_SUCCESS"]
    others += ["dataset_info.json", "tokenizer.json", "old/metrics.jsonl", "old/checkpoint-20/x.json", "README.md"]
    others += ["out/metrics-copy.jsonl", "cache/hashes.json", "configuration.json"]
    options.output_dir, options.data_cache_dir = str(root / "out"), str(root / "cache")
    for name in [*data, *others]:
        path = (elsewhere / "d.jsonl") if name == "linked/d.jsonl" else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(root)  # a circle
    options.train_file = str(root)
    (source,), _ = find_sources(options)
    assert [str(path).removeprefix(f"{root}/") for path in source.files] == data
    left_out = len(others)
    assert f"reads 4 files and leaves out {left_out} (" in capsys.readouterr().err
    monkeypatch.chdir(root)
    options.train_file = "**/*.json*"
    (source,), _ = find_sources(options)
    assert [str(path) for path in source.files] == ["a.jsonl", "deep/b.json"]
    assert "reads 2 files and leaves out 11 (" in capsys.readouterr().err
    for name in ("tokenizer.json", ".hidden.jsonl", ".hid*.jsonl"):  # asked for by its name
        options.train_file = name
        assert len(find_sources(options)[0][0].files) == 1
    assert capsys.readouterr().err == ""


def test_files_that_are_not_for_training(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is read twice, or that is validation data too, is named. So is a test split in a directory."""
    for name in ("train.jsonl", "test.jsonl", "latest.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "a"}\n')
    os.link(tmp_path / "in" / "train.jsonl", tmp_path / "copy.jsonl")
    options.train_file = f"{tmp_path}/in,{tmp_path}/copy.jsonl"
    options.validation_file = str(tmp_path / "in" / "test.jsonl")
    find_sources(options)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "trains on 1 (test.jsonl), too; move files that are not for training",
        "1 (copy.jsonl) is read twice; name each file once if that is not meant",
        "1 (test.jsonl) is training data, too; name each file once if that is not meant",
    ]
    monkeypatch.setenv("RANK", "1")
    find_sources(options)
    assert capsys.readouterr().err == ""


def test_data_sets(
    options: Options, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Directories of save_to_disk are read; other splits, files and columns that do not fit are named."""
    texts = [f"{number} words " * 20 for number in range(6)]
    one = datasets.Dataset.from_dict({"text": texts})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one.select(range(4)), "test": one.select([4, 5])}).save_to_disk(tmp_path / "two")
    for name, expected, streaming in (("one", texts, False), ("two", texts[:4], False), ("two", texts[:4], True)):
        options.dataset_name, options.streaming = str(tmp_path / name), streaming
        data = prepare_data(options, tokenizer)
        if streaming:
            first = next(iter(data.train)).tokens.tolist()
            assert first == expected_tokens(tokenizer, expected)[: len(first)]
        else:
            assert tokens_of(data.train) == expected_tokens(tokenizer, expected)
    assert "does not use 1 (test); no split is named validation" in capsys.readouterr().err
    options.streaming = False

    def refused(name: str) -> str:
        options.dataset_name = str(tmp_path / name)
        with pytest.raises(OptionError) as found:
            prepare_data(options, tokenizer)
        assert len(str(found.value).splitlines()) <= 3
        return str(found.value)

    datasets.DatasetDict({"test": one}).save_to_disk(tmp_path / "tests")
    assert "has no split named train, only test" in refused("tests")
    (tmp_path / "file.jsonl").write_text('{"text": "a"}')
    assert f"is a file; pass --train_file {tmp_path}/file.jsonl" in refused("file.jsonl")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "mixed" / "b.jsonl").write_text('{"text": "y", "extra": 1}\n')
    message = refused("mixed")
    assert "extra: int64" in message
    assert f"{tmp_path}/mixed/b.jsonl has the columns extra, text, and a.jsonl has text\n" in message
    options.dataset_name, options.train_file = None, str(tmp_path / "one")
    with pytest.raises(OptionError, match="was written by save_to_disk of datasets; pass --dataset_name"):
        find_sources(options)


SHORT = ["plain", "größer, 文字, 🙂", "a \r\n b", "", "  spaces", "x" * 300, "\n\n", "end"]
SHORT_LINES = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in SHORT * 2]
CUT = {
    "a.jsonl": b"\n".join(SHORT_LINES) + b"\n",
    "no-end.jsonl": b"\n".join(SHORT_LINES),
    "crlf.jsonl": b"\r\n".join(SHORT_LINES) + b"\r\n",
    "bom.jsonl": codecs.BOM_UTF8 + b"\n".join(SHORT_LINES),
    "blank.ndjson": b"\n\n\n" + b"\n\n".join(SHORT_LINES) + b"\n\n\n",
    "one.jsonl": SHORT_LINES[1],
    "a.txt": "\n".join(SHORT * 4).encode(),
    "crlf.txt": codecs.BOM_UTF8 + "\r\n".join(["größer", "  文字", "", "\t🙂", "more"] * 20).encode(),
    "indented.md": b"first\n" + b"  second\n" * 40,
    "no-line.txt": "文字".encode() * 100,
    "a.parquet": b"",
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("fragment", [1, 40])
def test_parts_of_a_file(name: str, fragment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In however many parts a file is read: each record is in one of them, whole, in its order and with its line."""
    monkeypatch.setattr("data.records.FRAGMENT", fragment)
    path = tmp_path / name
    path.write_bytes(CUT[name])
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{"text": text} for text in SHORT * 4]), path, row_group_size=5)
    source = Source("text", "key", (path,))
    records = list(read(source))
    assert can_cut(path)
    for parts in [*range(2, 25), 100, 301]:
        parts = min(parts, path.stat().st_size)
        found = [raw for number in range(parts) for raw in read_part(source, Part(0, number, parts), numbered=True)]
        if path.suffix in (".txt", ".md"):
            texts, whole = ([str(parsed(raw)["text"]) for raw in some] for some in (found, records))
            assert "".join(texts) == "".join(whole)
            assert [raw.begins for raw in found] == [True, *[False] * (len(found) - 1)]
            assert [raw.ends for raw in found] == [*[False] * (len(found) - 1), True]
            assert all(text[0].strip() for text in texts[1:])  # tokens are those of the whole text
        else:
            assert [(raw.place, raw.content) for raw in found] == [(raw.place, raw.content) for raw in records]


def test_a_part_reads_no_other(tmp_path: Path) -> None:
    """A record that is much larger than a part is read once. A range in which none begins is not read on."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 10_000 + b'"}\n{"text": "small"}\n')
    source = Source("text", "key", (path,))
    sizes = [[len(raw.content) for raw in read_part(source, Part(0, number, 10))] for number in range(10)]
    assert sizes == [[10_013], *[[]] * 8, [18]]
    path.write_bytes(b"\xff" * 5000)
    with pytest.raises(OptionError, match=r"max_record_bytes 4000: .*: line at byte 0 has more bytes than that"):
        list(read_part(replace(source, max_record_bytes=4000), Part(0, 0, 2)))
    assert list(read_part(replace(source, max_record_bytes=4000), Part(0, 1, 2))) == []


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.jsonl"])
def test_what_cannot_be_cut(name: str, tmp_path: Path) -> None:
    """A record may span lines, and only the lines before say so."""
    (tmp_path / name).write_bytes(b" \n" * 10_000 + b'[{"text": "a"}]')
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert not can_cut(tmp_path / name)
