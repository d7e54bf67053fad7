"""Proves config/errors.py and checkpoint/: a disk that fails is said with the path, and older checkpoints are used.

The disk is a loop device whose backing file is cut, so reads of what is not in memory fail with EIO.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import checkpoint.save
import data.sources
from config.errors import OptionError
from config.options import Options
from tests.launch import ROOT, train, train_ok


class Disk:
    """A file system of 32 MiB, mounted at `root`."""

    def __init__(self, place: Path) -> None:
        self.root, self.image = place / "disk", place / "image"
        self.root.mkdir()
        for command in (["truncate", "-s", "32M", self.image], ["mkfs.ext4", "-q", "-F", self.image]):
            subprocess.run([str(word) for word in command], check=True)
        mounted = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.root)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"needs a loop device: {mounted.stderr}")

    def fail(self) -> None:
        """From now on, contents cannot be read. Names and sizes stay in memory.

        The disk is read-only then: a write would make the image long again, and contents would be zeros.
        """
        subprocess.run(["mount", "-o", "remount,ro", str(self.root)], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        for path in self.root.rglob("*"):
            if path.is_file():
                path.stat()
        os.truncate(self.image, 0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    made = Disk(tmp_path)
    yield made
    subprocess.run(["umount", "--lazy", str(made.root)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train_file", "resume_from_checkpoint"])
@pytest.mark.fault(
    "storage",
    "a disk that cannot be read any more (EIO): training data, a checkpoint",
    "one message with the option and the path, exit code 2",
)
def test_reads_that_fail(tiny: list[object], train_file: Path, tmp_path: Path, disk: Disk, kind: str) -> None:
    argv: list[object] = [*tiny, "--output_dir", tmp_path / "run", "--max_steps", 3]
    if kind == "train_file":
        path = disk.root / "documents.jsonl"
        shutil.copy(train_file, path)
    else:
        train_ok(1, *tiny, "--max_steps", 2, "--save_steps", 2, "--output_dir", tmp_path / "first")
        path = disk.root / "checkpoint-2"
        shutil.copytree(tmp_path / "first" / "checkpoint-2", path)
    disk.fail()
    outcome = train(1, [*argv, f"--{kind}", path])
    assert outcome.exit_codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert f"train.py: error: {kind} {path}: " in outcome.output
    assert "Input/output error" in outcome.output


@pytest.mark.fault(
    "storage",
    "the disk of prepared data cannot be read (EIO)",
    "the message names data_cache_dir, and not the training file",
)
def test_cache_that_fails(train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hashes.json").touch()

    def fail(text: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(data.sources, "load_json", fail)
    options = Options(train_file=str(train_file), data_cache_dir=str(tmp_path))
    with pytest.raises(OptionError, match=f"^data_cache_dir {tmp_path}: Input/output error; pass a .* on another disk"):
        data.sources.find_sources(options)


@pytest.mark.slow
@pytest.mark.fault(
    "storage",
    "the disk of the model fails while its weights are read, which are mapped, so the system ends the process",
    "the error names the line that has read the weights",
)
def test_weights_that_fail(tiny: list[object], model_dir: Path, tmp_path: Path, disk: Disk) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "model.safetensors").rename(tmp_path / "weights")
    shutil.copy(tmp_path / "weights", disk.root / "model.safetensors")
    (model / "model.safetensors").symlink_to(disk.root / "model.safetensors")
    disk.fail()
    argv = [*tiny, "--output_dir", tmp_path / "run", "--model_name_or_path", model]
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, argv)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == -7, run.stderr
    assert "Fatal Python error: Bus error" in run.stderr
    assert "model/weights.py" in run.stderr


def broken_fsync(rank: int, number: int) -> None:
    """Patch a rank: the disk refuses to flush a file of a checkpoint."""
    if os.environ["RANK"] == str(rank):

        def fail(path: Path) -> None:
            raise OSError(number, os.strerror(number))

        checkpoint.save.fsync = checkpoint.save.fsync_and_hash = fail  # type: ignore[assignment]


@pytest.mark.parametrize("number", [errno.EIO, pytest.param(errno.ESTALE, marks=pytest.mark.slow)])
@pytest.mark.fault(
    "storage",
    "the disk of one rank fails while a checkpoint is flushed (EIO), or a network file system has lost it (ESTALE)",
    "all ranks end with a message, exit code 2; no checkpoint is left half written",
)
def test_flush_that_fails(tiny: list[object], tmp_path: Path, number: int) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 4, "--save_steps", 2]
    outcome = train(2, argv, before=partial(broken_fsync, 1, number))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert f"output_dir {tmp_path}: the checkpoint could not be written: " in outcome.output
    assert os.strerror(number) in outcome.output
    assert not list(tmp_path.glob("checkpoint-*"))
