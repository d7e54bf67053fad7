"""The files of a checkpoint: their names, their hashes, and the directories that hold them."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"

UNFINISHED = (".saving-*", ".exporting-*")  # left by an interrupted save or export

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def prune(output_dir: Path, limit: int | None, best_step: int) -> None:
    """Remove the oldest checkpoints beyond `limit`, and the directories that interrupted saves have left.

    The newest and the best checkpoint stay, as in transformers: with a limit of 1, these two.
    """
    for path in (path for pattern in UNFINISHED for path in output_dir.glob(pattern)):
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
    """The entry of a file in a manifest: size in bytes and SHA-256. Raises OSError."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
    return int(match[1]) if match and path.is_dir() and is_ours(path) else -1


def is_ours(path: Path) -> bool:
    """Whether this trainer wrote a directory: other trainers use the name checkpoint-STEP, too.

    Either the manifest lists state.json, or nothing is there that a checkpoint does not have: it may be damaged, or
    half removed.
    """
    with contextlib.suppress(OSError, ValueError):
        if STATE in json.loads((path / MANIFEST).read_text()):
            return True
    files = [file.relative_to(path) for file in path.rglob("*") if not file.is_dir()]
    return all(str(file) in (STATE, MANIFEST) or (file.match("shard-*") and len(file.parts) == 2) for file in files)
