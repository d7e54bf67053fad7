"""The files of a checkpoint: their names, their hashes, and the directories that hold them."""

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from runtime.files import read_json, regular_file

MANIFEST = "manifest.json"
STATE = "state.json"
FOLDERS = ("model", "optimizer")
LISTED = re.compile(r"state\.json|(model|optimizer)/\w[\w.-]*\.safetensors")  # what a manifest may list
MOST_JSON = 2**28  # bytes of a manifest or state; 10,000 ranks need a third of it

UNFINISHED = (".saving-*", ".exporting-*")  # left by an interrupted save or export
MEETINGS = ".meeting-*"  # left by a run that ended while it started

WEIGHT_FILES = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json"),
)


def prune(output_dir: Path, limit: int | None, best_step: int) -> None:
    """Remove the oldest checkpoints beyond `limit`, and the directories that interrupted saves have left.

    The newest and the best checkpoint stay, as in transformers: with a limit of 1, these two.
    """
    for path in (path for pattern in (*UNFINISHED, MEETINGS) for path in output_dir.glob(pattern)):
        shutil.rmtree(path)
    newest_first = list_checkpoints(output_dir)
    kept = [path for path in newest_first[1:] if step_of(path) == best_step]
    others = [path for path in newest_first[1:] if path not in kept]
    for path in others[max(0, limit - 1 - len(kept)) :] if limit else []:
        # The manifest goes first: without it, a half removed directory is no checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def fsync_and_hash(path: Path) -> dict[str, Any]:
    """Flush a file to the disk, and return its entry in a manifest: size in bytes and SHA-256."""
    fsync(path)
    return size_and_hash(path)


def size_and_hash(path: Path) -> dict[str, Any]:
    """The entry of a regular file in a manifest: size in bytes and SHA-256. Raises OSError."""
    with open(path, "rb", opener=regular_file) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint's manifest, by file name. The names are checked, and the entries are not.

    Raises OSError; ValueError for no manifest, or if the loader would find a file that the manifest does not list.
    """
    manifest = read_json(path / MANIFEST, MOST_JSON)
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise ValueError(f"{path / MANIFEST} does not list {STATE}")
    if strange := [name for name in manifest if not LISTED.fullmatch(name)]:
        raise ValueError(f"{path / MANIFEST} lists {strange[0][:100]!r}, which is no file of a checkpoint")
    for folder in (path / name for name in FOLDERS):
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link, which is not followed")
        names = {f"{folder.name}/{file.name}" for file in folder.glob("*.safetensors")}
        if unlisted := names - manifest.keys():
            raise ValueError(f"{path / min(unlisted)} is not listed in {MANIFEST}")
    return manifest


def fsync(path: Path) -> None:
    """Flush a file to the disk. For a new or changed name, flush the directory that holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that this trainer wrote, newest first, valid or damaged."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint of this trainer; -1 for any other path."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() and not path.is_symlink() and is_ours(path) else -1


def is_ours(path: Path) -> bool:
    """Whether this trainer wrote a directory: other trainers use the name checkpoint-STEP, too.

    Either the manifest lists state.json, or nothing is there that a checkpoint does not have: it may be damaged, or
    half removed.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        if STATE in read_json(path / MANIFEST, MOST_JSON):
            return True
    files = [file.relative_to(path) for file in path.rglob("*") if not file.is_dir()]
    return all(str(file) in (STATE, MANIFEST) or (file.match("shard-*") and len(file.parts) == 2) for file in files)
