"""Prepared data that changes on the disk, and files of text that are not what they seem."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import data.files.checked
from config.options import Options
from data.prepare import prepare_data
from tests.test_data import tokens_of


@pytest.fixture
def train_file(documents: list[str], tmp_path: Path) -> Path:
    """A small one, because it is prepared many times."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:24]))
    return path


@pytest.fixture
def options(train_file: Path, tmp_path: Path) -> Options:
    return Options(
        data_cache_dir=str(tmp_path / "cache"),
        train_file=str(train_file),
        block_size=32,
        packing="none",
        preprocessing_num_workers=1,
    )


def folder_of(cache: Path) -> Path:
    """The only prepared source in a cache directory."""
    (about,) = cache.glob("data-*/about.json")
    return about.parent


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit, as a bad disk does. The size and the inode stay."""
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def half(path: Path) -> int:
    return path.stat().st_size // 2


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = (
    *("tokens.bin", "tokens.bin.xxh3", "train/segments.bin", "train/sequences.bin", "train/segments.bin.xxh3"),
    *("validation/segments.bin", "validation/sequences.bin", "about.json"),
)

DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit flipped": lambda path: flip(path, half(path)),
    "truncated": lambda path: os.truncate(path, half(path)),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(8)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a directory": put_directory,
}


@pytest.mark.fault(
    "data",
    "a file of prepared data: one bit flipped, cut short, longer, empty, zeroed, missing, or replaced by a directory",
    "the start finds it, and prepares the data again: the sequences and the fingerprint are those of before",
)
def test_a_damaged_file_is_prepared_again(
    options: Options, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = prepare_data(options, tokenizer)
    expected = tokens_of(before.train), tokens_of(before.validation["eval"]), before.fingerprint
    folder = folder_of(tmp_path / "cache")
    for name in FILES:
        for damage, apply in DAMAGES.items():
            apply(folder / name)
            capfd.readouterr()
            again = prepare_data(options, tokenizer)
            assert "prepared data was damaged; it is prepared again" in capfd.readouterr().err, (name, damage)
            assert (tokens_of(again.train), tokens_of(again.validation["eval"]), again.fingerprint) == expected
    capfd.readouterr()
    prepare_data(options, tokenizer)
    assert capfd.readouterr().err == "", "an intact folder is not prepared again"


@pytest.mark.fault(
    "data",
    "prepared data swapped with those of another run: tokens of one size, an index, all metadata, or the folder",
    "the start finds it, and prepares the data again",
)
def test_files_of_other_data(
    options: Options, tokenizer: PreTrainedTokenizerBase, train_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(train_file.read_text().replace("the", "eht"))
    expected = tokens_of(prepare_data(options, tokenizer).train)
    folder = folder_of(tmp_path / "cache")
    options.train_file, options.data_cache_dir = str(other), str(tmp_path / "cache-of-other")
    prepare_data(options, tokenizer)
    strange = folder_of(tmp_path / "cache-of-other")
    options.train_file, options.data_cache_dir = str(train_file), str(tmp_path / "cache")
    for names in (["tokens.bin"], ["tokens.bin", "tokens.bin.xxh3"], ["train/segments.bin"], ["about.json"], ["."]):
        for name in names:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
                shutil.copytree(strange / name, path)
            else:
                size = path.stat().st_size
                shutil.copy(strange / name, path)
                os.truncate(path, size if name == "tokens.bin" else path.stat().st_size)
        assert tokens_of(prepare_data(options, tokenizer).train) == expected, names


@pytest.mark.fault(
    "data",
    "the files of an interrupted preparation changed: a bit of tokens, of counts or of the progress, cut off",
    "the preparation starts again, and has the same sequences",
)
def test_a_damaged_interrupted_preparation(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("data.cache.CHUNK", 2000)
    monkeypatch.setattr("data.cache.SYNC", 0.0)
    options.data_cache_dir = str(tmp_path / "intact")
    expected = prepare_data(options, tokenizer)
    interrupted = tmp_path / "interrupted"
    options.data_cache_dir = str(interrupted)
    written = data.files.checked.write_checked

    def stop_after_four(path: Path, value: dict[str, object]) -> None:
        written(path, value)
        writes.append(path)
        if len(writes) == 4:
            raise KeyboardInterrupt

    writes: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr("data.cache.write_checked", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(options, tokenizer)
    damages = [(name, damage) for name in ("tokens.bin", "records.bin", "progress.json") for damage in DAMAGES]
    for number, (name, damage) in enumerate([("none", "none"), *damages]):
        options.data_cache_dir = str(tmp_path / f"copy-{number}")
        shutil.copytree(interrupted, options.data_cache_dir)
        (partial,) = Path(options.data_cache_dir).glob("data-*.partial")
        assert json.loads((partial / "progress.json").read_text())["done"][0] > 0
        if damage != "none":
            DAMAGES[damage](partial / name)
        capfd.readouterr()
        again = prepare_data(options, tokenizer)
        assert (tokens_of(again.train), again.fingerprint) == (tokens_of(expected.train), expected.fingerprint), damage
        message = "the interrupted preparation was damaged; it starts again" in capfd.readouterr().err
        # Bytes of tokens and counts after the recorded progress are those of a process that was killed.
        unnoticed = {
            ("none", "none"),
            ("tokens.bin", "longer"),
            ("records.bin", "longer"),
            ("progress.json", "missing"),
        }
        assert message == ((name, damage) not in unnoticed), (name, damage)
