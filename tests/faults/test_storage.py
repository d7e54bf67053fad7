"""Proves checkpoint/output_dir.py and checkpoint/load.py: storage that is not shared, and files that lie.

A directory that one node sees alone is a bind mount in a mount namespace of one rank.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

import checkpoint.output_dir
from tests.launch import train, train_ok
from tests.test_resume import trajectory

CLONE_NEWNS = 0x20000  # <sched.h>


@pytest.fixture
def namespaces() -> None:
    """Skip where this process may not create mount namespaces."""
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs a mount namespace: {tried.stderr}")


def mount_on_rank_1(*mounts: Sequence[object]) -> None:
    """Patch a rank: give rank 1 a mount namespace of its own, and call `mount` in it with each of `mounts`."""
    checkpoint.output_dir.APPEARS = 0.5
    if os.environ["RANK"] == "1":
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        for arguments in (["--make-rprivate", "/"], *mounts):
            subprocess.run(["mount", *map(str, arguments)], check=True)


def on_rank_1(option: str, value: object) -> None:
    """Patch a rank: rank 1 has another value of an option."""
    checkpoint.output_dir.APPEARS = 0.5
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index(option) + 1] = str(value)


@pytest.mark.fault(
    "storage",
    "`output_dir` is another directory on one node, where an older run has left its files",
    "refused before the first step; the message names the ranks and the nodes",
)
def test_output_dir_that_one_node_sees_alone(tiny: list[object], tmp_path: Path, namespaces: None) -> None:
    run, local = tmp_path / "run", tmp_path / "local"
    for directory in (run, local):
        directory.mkdir()
        (directory / ".lock").touch()
    (local / ".meeting-1").mkdir()  # of a start that was killed
    outcome = train(2, [*tiny, "--output_dir", run], before=partial(mount_on_rank_1, ["--bind", local, run]))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    node = os.uname().nodename
    assert f"output_dir {run}: ranks [1] and rank 0 do not see what the other writes there\n" in outcome.output
    assert f"rank 0 writes to {node}:{run}; they write to {node}:{run}\npass a directory that all" in outcome.output
    assert sorted(path.name for path in run.iterdir()) == [".lock"]
    assert sorted(path.name for path in local.iterdir()) == [".lock", ".meeting-1"]


@pytest.mark.fault(
    "storage",
    "`output_dir` is another path on one rank",
    "refused before the first step",
)
def test_output_dir_of_another_name(tiny: list[object], tmp_path: Path) -> None:
    (tmp_path / "unseen").mkdir()
    (tmp_path / "unseen" / ".lock").touch()
    argv = [*tiny, "--output_dir", tmp_path / "output"]
    outcome = train(2, argv, before=partial(on_rank_1, "--output_dir", tmp_path / "unseen"))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "ranks [1] and rank 0 do not see what the other writes there" in outcome.output
    assert f":{tmp_path}/unseen\npass a directory that all nodes share" in outcome.output
    assert not (tmp_path / "output" / "metrics.jsonl").exists()


@pytest.mark.fault(
    "storage",
    "`output_dir` is read-only on one node",
    "refused before the first step; the message names the ranks and the node",
)
def test_output_dir_that_one_node_cannot_write(tiny: list[object], tmp_path: Path, namespaces: None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    mounts = (["--bind", run, run], ["-o", "remount,bind,ro", run])
    outcome = train(2, [*tiny, "--output_dir", run], before=partial(mount_on_rank_1, *mounts))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert f"ranks [1] cannot write to {os.uname().nodename}:{run}: Read-only file system\n" in outcome.output
    assert sorted(path.name for path in run.iterdir()) == [".lock"]


@pytest.mark.fault(
    "storage",
    "the checkpoint to resume is not the same directory on one node",
    "refused before anything is loaded",
)
@pytest.mark.slow
def test_a_checkpoint_that_one_node_sees_alone(tiny: list[object], tmp_path: Path, namespaces: None) -> None:
    first, run, local = tmp_path / "first", tmp_path / "run", tmp_path / "local"
    train_ok(2, *tiny, "--output_dir", first, "--max_steps", 2)
    shutil.copytree(first, local)
    next((local / "checkpoint-2" / "model").iterdir()).unlink()  # what this node never had
    argv = [*tiny, "--output_dir", run, "--resume_from_checkpoint", first / "checkpoint-2"]
    outcome = train(2, argv, before=partial(mount_on_rank_1, ["--bind", local, first]))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert f"{first}/checkpoint-2: ranks [1] do not see there what rank 0 sees\n" in outcome.output


@pytest.mark.fault(
    "storage",
    "`data_cache_dir` is not shared between nodes",
    "each node prepares its data; the run is that of a shared cache",
)
def test_data_cache_of_each_node(tiny: list[object], tmp_path: Path, namespaces: None) -> None:
    cache, local = tmp_path / "cache", tmp_path / "local"
    for directory in (cache, local):
        directory.mkdir()
    options = [*tiny, "--max_steps", 2, "--save_steps", 0]
    argv = [*options, "--output_dir", tmp_path / "run", "--data_cache_dir", cache]
    outcome = train(2, argv, before=partial(mount_on_rank_1, ["--bind", local, cache]))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert all(list(directory.glob("data-*/about.json")) for directory in (cache, local))
    train_ok(2, *options, "--output_dir", tmp_path / "shared")
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "shared")


@pytest.mark.fault(
    "storage",
    "one node has another training file under the same path",
    "refused before the first step",
)
def test_training_file_of_one_node(tiny: list[object], train_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "another text"}) + "\n" + train_file.read_text())
    argv = [*tiny, "--output_dir", tmp_path / "run"]
    outcome = train(2, argv, before=partial(on_rank_1, "--train_file", other))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "ranks [1]: not the same as on rank 0: data_fingerprint\n" in outcome.output
