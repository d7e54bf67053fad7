"""Proves runtime/files.py: what a user may not read or write is refused in words. Runs as user 65534, so it needs root.

A file that may not be read is never taken for one that is missing or damaged.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import world
from tests.launch import ROOT, train

NOBODY = 65534


@pytest.fixture(scope="module")
def options() -> Iterator[list[object]]:
    """The options of a short run whose files all users may read, as the files of pytest are not."""
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    for directory in (ROOT, *ROOT.parents):
        if not directory.stat().st_mode & 0o001:  # a clone in the directory of `mktemp -d`, say
            pytest.skip(f"{directory} is closed to other users, so none of them can run train.py")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        model, documents = world.make_model(place / "model"), world.make_train_file(place / "documents.jsonl")
        for path in model.iterdir():
            path.chmod(0o644)
        yield [*world.options(model, documents, place / "cache"), "--max_steps", 2]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that belongs to the other user."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        Path(name).chmod(0o755)
        yield Path(name)


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def deny(path: Path, mode: int = 0) -> Path:
    """Give a path to root alone."""
    os.chown(path, 0, 0)
    path.chmod(mode or (0o700 if path.is_dir() else 0o600))
    return path


def output_dir(place: Path, options: list[object]) -> tuple[list[object], str]:
    (place / "run").mkdir()
    path = deny(place / "run")
    return [], f"output_dir {path}: Permission denied\n"


def lock(place: Path, options: list[object]) -> tuple[list[object], str]:
    (place / "run").mkdir()
    (place / "run").chmod(0o777)
    (place / "run" / ".lock").touch()
    return [], f"output_dir {deny(place / 'run' / '.lock')}: Permission denied; pass a directory that can be written\n"


def copied(place: Path, options: list[object], option: str) -> Path:
    """A copy of what an option names, below `place`."""
    source = Path(str(options[options.index(option) + 1]))
    (place / "copy").mkdir()
    target = place / "copy" / source.name
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return target


def train_file(place: Path, options: list[object]) -> tuple[list[object], str]:
    path = copied(place, options, "--train_file")
    deny(path.parent)
    return ["--train_file", path], f"train_file {path}: Permission denied\n"


def one_of_a_glob(place: Path, options: list[object]) -> tuple[list[object], str]:
    """Another directory that the glob matches can be read. Python's glob leaves out this one."""
    path = copied(place, options, "--train_file")
    (place / "other").mkdir()
    shutil.copy(path, place / "other")
    return ["--train_file", f"{place}/*/*.jsonl"], f"train_file {deny(path.parent)}: Permission denied\n"


def one_of_a_directory(place: Path, options: list[object]) -> tuple[list[object], str]:
    _, message = one_of_a_glob(place, options)
    return ["--train_file", place], message


def cache(place: Path, options: list[object]) -> tuple[list[object], str]:
    (place / "cache").mkdir()
    path = deny(place / "cache")
    return ["--data_cache_dir", path], f"data_cache_dir {path}: Permission denied; pass a writable directory\n"


def weights(place: Path, options: list[object]) -> tuple[list[object], str]:
    path = copied(place, options, "--model_name_or_path")
    denied = deny(path / "model.safetensors")
    return ["--model_name_or_path", path], f"model_name_or_path {denied}: Permission denied\n"


def model(place: Path, options: list[object]) -> tuple[list[object], str]:
    path = copied(place, options, "--model_name_or_path")
    return ["--model_name_or_path", path], f"model_name_or_path {deny(path)}: Permission denied\n"


def trained(place: Path, options: list[object]) -> list[object]:
    """The options that continue a run of the other user, with checkpoints of two steps."""
    argv = [*options, "--output_dir", place / "run", "--save_steps", 1, "--data_cache_dir", place / "cache"]
    assert train(1, argv, before=become_nobody).exit_codes == [0]
    return ["--data_cache_dir", place / "cache", "--resume_from_checkpoint", "auto", "--max_steps", 3]


def checkpoint(place: Path, options: list[object]) -> tuple[list[object], str]:
    argv = trained(place, options)
    path = deny(place / "run" / "checkpoint-2" / "model")
    return argv, f"resume_from_checkpoint {path}: Permission denied\n"


def metrics(place: Path, options: list[object]) -> tuple[list[object], str]:
    argv = trained(place, options)
    return argv, f"output_dir {deny(place / 'run' / 'metrics.jsonl')}: Permission denied\n"


def old_checkpoint(place: Path, options: list[object]) -> tuple[list[object], str]:
    """Saving would have to remove a checkpoint that belongs to another user."""
    argv = [*trained(place, options), "--save_total_limit", 1]
    path = deny(place / "run" / "checkpoint-1", 0o755)
    return argv, f"{path}/manifest.json: it cannot be written: Permission denied\nlet the run write there"


QUICK = [train_file, output_dir]
SLOW = [
    *(lock, one_of_a_glob, one_of_a_directory, cache, weights, model),
    *(checkpoint, metrics, old_checkpoint),
]


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=lambda case: case.__name__
)
@pytest.mark.fault(
    "storage",
    "a file or directory belongs to another user, and may not be read or written: output, data, cache, model, "
    "checkpoint",
    "one message with the option, the path and the remedy, exit code 2; no data is left out, no checkpoint put aside",
)
def test_permission_denied(
    options: list[object], place: Path, case: Callable[[Path, list[object]], tuple[list[object], str]]
) -> None:
    argv, message = case(place, options)
    outcome = train(1, [*options, "--output_dir", place / "run", *argv], before=become_nobody)
    assert outcome.exit_codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.output.count("train.py: error: ") == 1
    assert message in outcome.output
    assert not list(place.rglob("*put-aside*"))
