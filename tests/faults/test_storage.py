"""Proves checkpoint/output_dir.py and checkpoint/load.py: storage that is not shared, and files that lie.

A directory that one node sees alone is a bind mount in a mount namespace of one rank.
"""

import ctypes
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint.output_dir
from checkpoint.output_dir import claim_output_dir
from config.errors import OptionError
from config.options import Options
from data.sources import cache_directory
from metrics.records import drop_records_beyond
from model.weights import Source, Stored, files_of, fingerprint_files
from runtime.files import require_trusted
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
def test_training_file_of_one_node(tiny: list[object], train_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "another text"}) + "\n" + train_file.read_text())
    argv = [*tiny, "--output_dir", tmp_path / "run"]
    outcome = train(2, argv, before=partial(on_rank_1, "--train_file", other))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "ranks [1]: not the same as on rank 0: data_fingerprint\n" in outcome.output


@pytest.mark.fault(
    "storage",
    "`output_dir` is on a file system that is mounted read-only",
    "refused before the first step",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_read_only_output_dir(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr}")
    try:
        for path in (tmp_path, tmp_path / "new" / "run"):
            with pytest.raises(OptionError, match=f"output_dir {path}: Read-only file system; pass a directory that"):
                claim_output_dir(Options(output_dir=str(path)), 0)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_weights_that_differ_in_one_layer(tmp_path: Path) -> None:
    """What identifies a file of weights covers all layers of it, and not only its beginning."""
    tensors = {f"layers.{number}": torch.zeros(2**18) for number in range(8)}  # 1 MiB each
    seen = set()
    for number in (None, *range(8)):
        changed = tensors if number is None else tensors | {f"layers.{number}": torch.ones(2**18)}
        path = tmp_path / "model.safetensors"
        save_file(changed, path)
        stored = Stored(str(path), "layers.0", (2**18,), torch.float32)
        seen.add(fingerprint_files(files_of({"layers.0": Source(None, {"layers.0": [stored]})})))
    assert len(seen) == 9


@pytest.mark.fault(
    "storage",
    "one node has another config.json under the same path, with equal shapes",
    "refused before the first step; the message names the entry",
)
@pytest.mark.slow
def test_config_of_one_node(tiny: list[object], model_dir: Path, model_with_dropout: Path, tmp_path: Path) -> None:
    argv = [*tiny, "--output_dir", tmp_path / "run"]
    outcome = train(2, argv, before=partial(on_rank_1, "--model_name_or_path", model_with_dropout))
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "ranks [1]: not the same as on rank 0: config.json: attention_dropout\n" in outcome.output


NAMES = [
    *(".lock", "metrics.jsonl", "checkpoint-20", "model.safetensors", "model-00001-of-00002.safetensors"),
    *("config.json", "tokenizer.json", "ledger", "ledger/rank-0.jsonl", "ledger/about.json", "trace/steps-3-4.json"),
    *("tensorboard", ".saving-1", ".exporting-1", ".meeting-1", "wandb", "swanlab", "trackers.json"),
    *("memory", "memory/rank-0.pickle"),
]


@pytest.mark.fault(
    "storage",
    "a link, a pipe or a device in `output_dir` under a name that a run writes",
    "refused with a line that names it; what a link points to is unchanged",
)
@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "device"])
def test_links_in_output_dir(kind: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for number, name in enumerate(NAMES):
        outside.write_text("mine")
        (folder / "file").parent.mkdir(exist_ok=True)
        run = tmp_path / str(number)
        path = run / name
        path.parent.mkdir(parents=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            try:
                os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
            except PermissionError:
                pytest.skip("needs root to create a device")
        else:
            path.symlink_to({"link": outside, "dangling": tmp_path / "none", "folder": folder}[kind])
        for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}):
            with pytest.raises(
                OptionError, match=f"{name} is (a link|no file), and a run would write there\nremove it"
            ):
                claim_output_dir(Options(output_dir=str(run), **more), 0)
        assert outside.read_text() == "mine"
        assert not (tmp_path / "none").exists()
        assert list(folder.iterdir()) == []


@pytest.mark.fault(
    "storage",
    "`output_dir` itself is a link",
    "the run writes to the directory that it points to",
)
def test_output_dir_may_be_a_link(tiny: list[object], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    (tmp_path / "disk" / "notes").symlink_to(tmp_path)  # no name of a run
    train_ok(1, *tiny, "--output_dir", tmp_path / "run", "--max_steps", 1, "--ledger")
    for name in ("checkpoint-1", "ledger", "metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "disk" / name).exists()


@pytest.mark.fault(
    "storage",
    "a link takes the place of metrics.jsonl while a run writes it",
    "not followed; all ranks end with a message",
)
@pytest.mark.slow
def test_link_during_a_run(tiny: list[object], tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.write_text("mine")

    def plant(ranks: object) -> None:
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        (tmp_path / "link").symlink_to(outside)
        (tmp_path / "link").rename(metrics)

    outcome = train(2, [*tiny, "--output_dir", run, "--max_steps", 4000, "--logging_steps", 1], meanwhile=plant)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert f"error: {run}/metrics.jsonl: it cannot be written: it is a link, which is not followed\n" in outcome.output
    assert outside.read_text() == "mine"


@pytest.mark.fault(
    "storage",
    "`output_dir` is removed while a run writes to it",
    "all ranks end with a message that names a path",
)
@pytest.mark.parametrize(
    "save", [pytest.param(["--save_steps", 1, "--logging_steps", 4000], marks=pytest.mark.slow), []]
)
def test_output_dir_removed_during_a_run(tiny: list[object], tmp_path: Path, save: list[object]) -> None:
    run = tmp_path / "run"

    def remove(ranks: object) -> None:
        wait_for(lambda: (run / "metrics.jsonl").exists())
        run.rename(tmp_path / "elsewhere")

    outcome = train(2, [*tiny, "--output_dir", run, "--max_steps", 4000, "--logging_steps", 1, *save], meanwhile=remove)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert "No such file or directory" in outcome.output
    assert f" {run}" in outcome.output


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait until something has happened outside of this process."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "it hung"
        time.sleep(0.01)


@pytest.mark.fault(
    "security",
    "a data cache that all users may write",
    "refused with the command that closes it; a new cache belongs to its user alone",
)
def test_cache_that_all_users_write(tmp_path: Path) -> None:
    new = cache_directory(str(tmp_path / "parent" / "new"))
    assert new.stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(OptionError, match=rf"any user can change {shared}, .*\nrun chmod -R o-w {shared}, or pass"):
        cache_directory(str(shared))
    shared.chmod(0o1777)  # as /tmp: all may create names there
    (shared / "data-1").mkdir()
    require_trusted(cache_directory(str(shared)) / "data-1", shared)
    (shared / "data-2").mkdir()
    (shared / "data-2" / "tokens.bin").touch()
    (shared / "data-2" / "tokens.bin").chmod(0o666)
    with pytest.raises(OptionError, match=r"any user can change .*data-2"):
        require_trusted(shared / "data-2", shared)


@pytest.mark.fault(
    "security",
    "a data cache, or prepared data in it, that belongs to another user or to a group",
    "a warning that names the owner, once; refused where all users may create files",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file to another user")
def test_cache_of_another_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = pwd.getpwnam("nobody")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    os.chown(cache, nobody.pw_uid, nobody.pw_gid)
    for _ in range(2):
        cache_directory(str(cache))
    assert capsys.readouterr().err == (
        f"warning: data_cache_dir {cache}: {cache} belongs to nobody, who can change what is trained on\n"
    )
    group = tmp_path / "group"
    group.mkdir()
    group.chmod(0o2775)
    os.chown(group, 0, 54321)  # a group without a name
    cache_directory(str(group))
    assert capsys.readouterr().err == (
        f"warning: data_cache_dir {group}: belongs to root, and all of group 54321 can change what is trained on\n"
    )
    (group / "data-1").mkdir()
    os.chown(group / "data-1", 12345, 54321)
    require_trusted(group / "data-1", group)
    assert "data-1 belongs to 12345, who can change" in capsys.readouterr().err
    everyone = tmp_path / "everyone"
    everyone.mkdir()
    everyone.chmod(0o1777)
    (everyone / "data-1").mkdir()
    os.chown(everyone / "data-1", 12345, 54321)
    with pytest.raises(OptionError, match=r"all users can write there, and .*data-1 belongs to 12345\npass a --data_c"):
        require_trusted(everyone / "data-1", everyone)


@pytest.mark.slow
def test_a_run_with_a_planted_cache(tiny: list[object], tmp_path: Path) -> None:
    """The check is part of a run: prepared data that another user may have written is refused."""
    cache = tmp_path / "cache"
    argv = [*tiny, "--data_cache_dir", cache, "--save_steps", 0, "--output_dir"]
    cache.mkdir()
    cache.chmod(0o755)
    train_ok(1, *argv, tmp_path / "first", "--max_steps", 1)
    (tokens,) = cache.glob("data-*/tokens.bin")
    tokens.chmod(0o666)
    outcome = train(1, [*argv, tmp_path / "second", "--max_steps", 1])
    assert outcome.exit_codes == [2], outcome.output
    assert f"error: data_cache_dir {cache}: any user can change {tokens.parent}, and so what is tra" in outcome.output


@pytest.mark.fault(
    "storage",
    "metrics.jsonl of another program: no text, nested too deep, or one endless line",
    "refused as a file that this trainer did not write",
)
@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"1" * 10_000, b"5", b"null", b'{"step": 1}'], ids=len)
def test_metrics_of_another_program(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}):
        with pytest.raises(OptionError, match=r"this trainer did not write metrics\.jsonl, and a run would replace"):
            claim_output_dir(Options(output_dir=str(tmp_path), **more), 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_records_of_a_resumed_run_that_are_none(tmp_path: Path) -> None:
    """Lines that are no records are left out, whatever they hold."""
    lines = [b'{"step": 1}', b"\xff", b"[" * 100_000, b"5", b"null", b"{}", b'{"step": "2"}', b'{"step": 3}', b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    drop_records_beyond(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]
