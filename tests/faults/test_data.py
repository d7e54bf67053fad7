"""Prepared data that changes on the disk, and files of text that are not what they seem."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import data.cache
import data.files.checked
from config.options import Options
from data.prepare import prepare_data
from metrics.records import read_records
from tests.launch import train, train_ok
from tests.test_data import tokens_of


@pytest.fixture
def text_file(documents: list[str], tmp_path: Path) -> Path:
    """A small one, because it is prepared many times."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:24]))
    return path


@pytest.fixture
def options(text_file: Path, tmp_path: Path) -> Options:
    return Options(
        data_cache_dir=str(tmp_path / "cache"),
        train_file=str(text_file),
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
    for number, name in enumerate(FILES):
        # All damages of the first file, and three of each other one: each costs a preparation.
        for damage in DAMAGES if number == 0 else list(DAMAGES)[number % 3 :: 3]:
            DAMAGES[damage](folder / name)
            capfd.readouterr()
            again = prepare_data(options, tokenizer)
            assert "prepared data was damaged; it is prepared again" in capfd.readouterr().err, (name, damage)
            assert (tokens_of(again.train), tokens_of(again.validation["eval"]), again.fingerprint) == expected
    capfd.readouterr()
    prepare_data(options, tokenizer)
    assert capfd.readouterr().err == "", "an intact folder is not prepared again"


def verify_only_when_read() -> None:
    """Patch a rank so that it treats its small data as data that is too large to verify at the start."""
    data.cache.VERIFIED_AT_START = 0


def read_badly_on_rank_1() -> None:
    """Patch a rank so that one bit is wrong in what rank 1 reads, as on a node with a bad disk or memory."""
    verify_only_when_read()
    read = os.pread

    def badly(file: int, size: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{file}").readlink().suffix != ".bin":
            return read(file, size, offset)
        return bytes([read(file, size, offset)[0] ^ 1]) + read(file, size - 1, offset + 1)

    if os.environ["RANK"] == "1":
        os.pread = badly


def ended(before: Callable[[], None], *argv: object) -> list[str]:
    """The messages with which two ranks end. No rank may be left, or print a traceback."""
    outcome = train(2, argv, before)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert "Error" not in outcome.output
    _, *messages = outcome.output.split("train.py: error: ")
    assert all(len(message.splitlines()) <= 3 for message in messages), outcome.output
    return messages


@pytest.mark.fault(
    "data",
    "one bit flipped in prepared data too large to verify at the start, in training, in a resume, and in evaluation",
    "all ranks end before they train on it, with the file, its bytes and the remedy; a resume has the same data",
)
@pytest.mark.parametrize("split", ["train", pytest.param("validation", marks=pytest.mark.slow)])
def test_a_flipped_bit_is_not_trained_on(split: str, tiny: list[object], train_file: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    options = [*tiny, "--train_file", train_file, "--data_cache_dir", cache, "--output_dir", run]
    options += ["--validation_split_percentage", 20, "--max_steps", 4, "--save_steps", 2, "--ledger"]
    options += ["--dataloader_num_workers", 1]
    train_ok(2, *options)
    unbroken = read_records(run / "metrics.jsonl")
    folder = folder_of(cache)
    damaged = folder / "tokens.bin"
    if split == "validation":
        damaged = folder / "validation" / "segments.bin"
    flip(damaged, 8)
    shutil.rmtree(run / "checkpoint-4")
    resume = [*options, "--resume_from_checkpoint", "auto", "--eval_steps", 4]
    messages = ended(verify_only_when_read, *resume)
    assert len(messages) == 2
    for message in messages:
        assert f"{damaged}: bytes 0 to " in message
        assert f"remove {folder}; the next start prepares it again" in message
    shutil.rmtree(folder)
    train_ok(2, *resume)
    assert [record.get("loss") for record in read_records(run / "metrics.jsonl")] == [
        record.get("loss") for record in unbroken
    ]


@pytest.mark.fault(
    "data",
    "prepared data that one rank alone reads wrong, from its loader process or not",
    "all ranks end with the message of this rank, and no traceback",
)
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_rank_alone_reads_badly(workers: int, tiny: list[object], train_file: Path, tmp_path: Path) -> None:
    options = [*tiny, "--train_file", train_file, "--data_cache_dir", tmp_path / "cache"]
    options += ["--output_dir", tmp_path / "run", "--dataloader_num_workers", workers]
    train_ok(2, *options, "--max_steps", 1)
    messages = ended(read_badly_on_rank_1, *options, "--max_steps", 2, "--overwrite_output_dir")
    own, other = sorted(messages, key=lambda message: message.startswith("rank 1: "))
    assert other == f"rank 1: {own}"
    assert "/segments.bin: bytes 0 to " in own or "/sequences.bin: bytes 0 to " in own


@pytest.mark.fault(
    "data",
    "prepared data swapped with those of another run: tokens of one size, an index, all metadata, or the folder",
    "the start finds it, and prepares the data again",
)
def test_files_of_other_data(
    options: Options, tokenizer: PreTrainedTokenizerBase, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text_file.read_text().replace("the", "eht"))
    expected = tokens_of(prepare_data(options, tokenizer).train)
    folder = folder_of(tmp_path / "cache")
    options.train_file, options.data_cache_dir = str(other), str(tmp_path / "cache-of-other")
    prepare_data(options, tokenizer)
    strange = folder_of(tmp_path / "cache-of-other")
    options.train_file, options.data_cache_dir = str(text_file), str(tmp_path / "cache")
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
