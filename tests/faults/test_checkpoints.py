"""Proves checkpoint/load.py, files.py and identity.py: a checkpoint whose files lie is never loaded.

The manifest is written anew after each change to another file, so the hashes agree and the contents must be judged.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint.files import list_checkpoints, prune, size_and_hash
from checkpoint.load import load_tensors, problems
from config.errors import OptionError
from tests.launch import train, train_ok

RESUME = ["--resume_from_checkpoint", "auto"]
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def saved(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with two checkpoints."""
    run = tmp_path_factory.mktemp("saved")
    train_ok(1, *tiny, "--output_dir", run, "--max_steps", 4, "--save_steps", 2)
    return run


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint."""
    shutil.copytree(saved / "checkpoint-4", tmp_path / "checkpoint-4")
    return tmp_path / "checkpoint-4"


def sign(path: Path, **more: Any) -> None:
    """Write the manifest that fits the files that it lists, and the entries `more`."""
    manifest = json.loads((path / "manifest.json").read_text())
    entries = {name: size_and_hash(path / name) for name in manifest}
    (path / "manifest.json").write_text(json.dumps(entries | more))


def edit_state(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change the value of state.json, and sign it."""
    state = json.loads((path / "state.json").read_text())
    changed = edit(state)
    (path / "state.json").write_text(changed if isinstance(changed, str) else json.dumps(state))
    sign(path)


@pytest.mark.fault(
    "storage",
    "a file in a checkpoint that its manifest does not list",
    "never read: the checkpoint counts as damaged, and `auto` resumes the one before it",
)
def test_a_file_that_is_not_listed(tiny: list[object], saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    newest = run / "checkpoint-4"
    tensors = {name: tensor + 1 for name, tensor in load_file(newest / "model" / SHARD).items()}
    with safe_open(newest / "model" / SHARD, "pt") as file:
        save_file(tensors, newest / "model" / "shard-00002-model-00001-of-00001.safetensors", file.metadata())
    output = train_ok(1, *tiny, "--output_dir", run, "--max_steps", 6, *RESUME)
    assert f"resumed from {run}/checkpoint-2\n" in output
    assert f"warning: {newest}: damaged, trying the one before it: {newest}/model/shard-00002-model" in output
    (newest,) = run.glob("checkpoint-4-put-aside-*")
    argv = [*tiny, "--output_dir", tmp_path / "new", "--max_steps", 6, "--resume_from_checkpoint", newest]
    outcome = train(1, argv)
    assert outcome.exit_codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert "shard-00002-model-00001-of-00001.safetensors is not listed in manifest.json\n" in outcome.output


ELSEWHERE = [
    "/etc/hostname",
    "../state.json",
    "model/../state.json",
    "/dev/zero",
    "model/pipe",
    "",
    ".",
    "model",
    "x" * 9,
]


@pytest.mark.fault(
    "storage",
    "a manifest that lists absolute paths, parent directories, devices, pipes or links",
    "refused without opening them",
)
@pytest.mark.timeout(120)  # a read of /dev/zero would never end
def test_paths_of_a_manifest(copy: Path) -> None:
    os.mkfifo(copy / "model" / "pipe")
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ELSEWHERE:
        entry = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        (copy / "manifest.json").write_text(json.dumps(manifest | {name: entry}))
        (found,) = problems(copy)
        assert f"lists {name!r}, which is no file of a checkpoint" in found


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero


@pytest.mark.fault(
    "storage",
    "a link, a pipe or a device instead of a file of a checkpoint",
    "never opened for its content; the checkpoint counts as damaged",
)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", f"model/{SHARD}"])
@pytest.mark.parametrize("replace", [linked, piped, endless])
def test_files_that_are_no_files(copy: Path, name: str, replace: Callable[[Path], None]) -> None:
    try:
        replace(copy / name)
    except PermissionError:
        pytest.skip("needs root to create a device")
    (found,) = problems(copy)
    assert f"{copy / name} cannot be read: it is " in found
    assert list_checkpoints(copy.parent) in ([copy], [])  # which asks whose it is, and does not hang either


@pytest.mark.fault(
    "storage",
    "a folder of a checkpoint, or a checkpoint, that is a link",
    "not followed: neither resumed by `auto` nor pruned",
)
def test_linked_folders(copy: Path, tmp_path: Path) -> None:
    (copy / "optimizer").rename(tmp_path / "optimizer")
    (copy / "optimizer").symlink_to(tmp_path / "optimizer")
    assert problems(copy) == [f"{copy}/optimizer is a link, which is not followed"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-4").symlink_to(copy)
    assert list_checkpoints(run) == []
    prune(run, 1, 0)
    assert (copy / "manifest.json").exists()


MANIFESTS = {
    "empty": b"",
    "not UTF-8": b'{"state.json": "\xff"}',
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "null": b"null",
    "a number of many digits": b"1" * 10_000,
    "without state.json": b"{}",
    "a name twice": b'{"state.json": {"bytes": 1}, "state.json": {"bytes": 2}}',
    "entries of other types": b'{"state.json": [1]}',
    "a size that lies": b'{"state.json": {"bytes": 1000000000000, "sha256": ""}}',
    "a size that is no number": b'{"state.json": {"bytes": NaN, "sha256": 1e999}}',
    "another name": b'{"state.json": {"bytes": 1}, "\\ud800": {}}',
}


@pytest.mark.fault(
    "storage",
    "a manifest that is not one: empty, not UTF-8, nested too deep, with other types or sizes",
    "the checkpoint counts as damaged, with the reason",
)
@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_lie(copy: Path, kind: str) -> None:
    (copy / "manifest.json").write_bytes(MANIFESTS[kind])
    (found,) = problems(copy)
    assert len(found) < 300
    found.encode()  # can be printed


def put(place: str, value: Any) -> Callable[[Any], Any]:
    """Set an entry of state.json, at keys that are separated by points; ... removes it."""

    def edit(state: Any) -> None:
        *parents, last = place.split(".")
        for key in parents:
            state = state[int(key)] if isinstance(state, list) else state[key]
        if value is ...:
            del state[last]
        else:
            state[last] = value

    return edit


NESTED: Any = []
for _ in range(400):
    NESTED = [NESTED]

WRONG: Any = ["7", -1, 1.5, 2**63, 10**400, None, True, [], {}, float("nan"), float("inf"), NESTED]
CURSORS: list[Any] = [1, [1], [[1]], [[1, 2, 3, 4, 5, -6]], [["1"] * 6], [[2**43] * 6]]
RATES: list[Any] = ["1", float("nan"), [], 10**400]
BESTS: list[Any] = [None, [], "x"]
STEPS: list[Any] = [None, [], {"a": -1}, {"a": "1"}, {"a": 1e300}]
RNGS: list[Any] = [None, [], {}, [1], [{}], [{"cpu": 1}], [{"cpu": "?"}], [{"cpu": ""}], [{"cpu": "é"}]]
STATES = {
    "empty": lambda state: " ",
    "null": lambda state: "null",
    "a list": lambda state: "[]",
    "nested": lambda state: "[" * 100_000,
    "an unknown key": put("more", 1),
    **{f"without {name}": put(name, ...) for name in ("progress", "optimizer_steps", "rng", "options", "versions")},
    **{f"without {name}": put(f"progress.{name}", ...) for name in ("step", "tokens_seen", "seed", "data_fingerprint")},
    "unknown progress": put("progress.more", 1),
    "unknown best": put("progress.best.more", 1),
    **{
        f"{name} {str(value)[:20]}": put(f"progress.{name}", value)
        for name in ("step", "tokens_seen", "skipped_steps", "best.step", "best.without_improvement")
        for value in WRONG
    },
    **{f"cursor {str(value)[:20]}": put("progress.cursor", value) for value in CURSORS},
    **{f"rate {str(value)[:20]}": put("progress.learning_rate", value) for value in RATES},
    **{f"best {str(value)[:20]}": put("progress.best", value) for value in BESTS},
    **{f"steps {str(value)[:20]}": put("optimizer_steps", value) for value in STEPS},
    **{f"rng {str(value)[:20]}": put("rng", value) for value in RNGS},
    "rng of another size": put("rng", [{"cpu": base64.b64encode(bytes(100)).decode()}]),
    "rng that is none": put("rng", [{"cpu": base64.b64encode(bytes(5056)).decode()}]),
    "fingerprint": put("progress.model_fingerprint", ["x"]),
}


@pytest.mark.fault(
    "storage",
    "state.json with wrong types, negative or huge numbers, NaN, unknown or missing keys, nested too deep, or empty, "
    "under a manifest that fits",
    "the checkpoint counts as damaged, with the reason",
)
@pytest.mark.parametrize("kind", STATES)
def test_states_that_lie(copy: Path, kind: str) -> None:
    assert problems(copy) == []
    edit_state(copy, STATES[kind])
    (found,) = problems(copy)
    assert len(found) < 300


@pytest.mark.fault(
    "storage",
    "state.json that is not UTF-8, or larger than any run writes",
    "refused before it is parsed",
)
def test_states_that_are_no_text(copy: Path) -> None:
    (copy / "state.json").write_bytes(b'{"progress": "\xff"}')
    sign(copy)
    assert len(problems(copy)) == 1
    with open(copy / "state.json", "wb") as file:
        file.truncate(2**28 + 1)  # sparse
    sign(copy)
    assert problems(copy) == ["it has more than 268,435,456 bytes"]


@pytest.mark.fault(
    "storage",
    "a checkpoint whose tensors are missing, misshapen, of another type, or not there in full",
    "a message that names the tensor, exit code 2",
)
def test_tensors_that_do_not_fit(copy: Path, alone: None) -> None:
    path = copy / "model" / SHARD
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    wanted = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load_tensors(copy / "model", wanted)
    name = "model.norm.weight"
    assert wanted[name].equal(tensors[name])
    sharding = json.loads(metadata["DCP_SHARDING_INFO"])
    for change, info, message in (
        ({name: None}, None, "it holds 0 of the 32 numbers of model.norm.weight"),
        ({name: torch.zeros(31)}, None, "it holds 31 of the 32 numbers of model.norm.weight"),
        ({name: torch.zeros(4, 8)}, None, "it cannot be loaded: "),
        ({name: torch.zeros(32, dtype=torch.bfloat16)}, None, "model.norm.weight is BF16 in shard-00001"),
        ({name: torch.zeros(32, dtype=torch.int32)}, None, "model.norm.weight is I32 in shard-00001"),
        ({}, {name: {"saved_offsets": [7]}}, "it cannot be loaded: "),
        ({}, {name: {"saved_offsets": ["x"]}}, "it cannot be loaded: "),
        ({}, {name: {"saved_offsets": [2**70]}}, "it cannot be loaded: "),
        ({}, {name: {}}, "it cannot be loaded: "),
        ({}, {"other": {}}, "it cannot be loaded: "),
    ):
        changed = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        new = sharding if info is None else sharding | info if name in info else info
        save_file(changed, path, metadata | {"DCP_SHARDING_INFO": json.dumps(new)})
        with pytest.raises(OptionError, match=message) as error:
            load_tensors(copy / "model", wanted)
        assert "pass --resume_from_checkpoint auto, or another checkpoint" in str(error.value)
    path.write_bytes(b"no header")
    with pytest.raises(OptionError, match=f"{path.name} is damaged: "):
        load_tensors(copy / "model", wanted)


@pytest.mark.fault(
    "storage",
    "a checkpoint that lies in one of these ways is resumed by a run of two ranks",
    "both ranks end with one message and exit code 2, without a traceback",
)
def test_a_run_that_resumes_it(tiny: list[object], copy: Path, tmp_path: Path) -> None:
    path = copy / "model" / SHARD
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, path, metadata)
    sign(copy)
    argv = [*tiny, "--output_dir", tmp_path / "run", "--max_steps", 6, "--resume_from_checkpoint", copy]
    outcome = train(2, argv)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert (
        f"error: {copy}/model: model.norm.weight is F16 in {SHARD}, and torch.float32 in this run\n" in outcome.output
    )
