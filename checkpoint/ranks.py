"""Python objects and file work over all ranks: every rank must call, and all see the same result or error."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.files import fsync_and_hash
from config.errors import OptionError


def compute_once(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `compute`, read from `path` if an earlier run has stored it there. Every rank must call.

    All ranks get the same CPU tensors. Only rank 0 reads and writes. A damaged file, or one that was stored under
    another name, is computed again. Raises OptionError on all ranks if rank 0 cannot write.
    """
    found = broadcast_object(_stored(path) if dist.get_rank() == 0 else None)
    if found is not None:
        return found
    computed = compute()

    def write() -> None:
        if dist.get_rank() == 0:
            beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            try:
                save_file(computed, beside, {"sha256": _hash_tensors(path.name, computed)})
                fsync_and_hash(beside)
                os.replace(beside, path)
            except SafetensorError as error:  # of the operating system: a full disk
                raise OSError(str(error)) from error
            finally:
                beside.unlink(missing_ok=True)

    try:
        run_together(write)
    except OSError as error:
        raise OptionError(f"{path}: it cannot be written: {error}; pass a --data_cache_dir with room") from error
    return computed


def _stored(path: Path) -> dict[str, Tensor] | None:
    """The tensors in a file of `compute_once`, or None if it is missing or damaged."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, because it is no dictionary
        if (file.metadata() or {}).get("sha256") == _hash_tensors(path.name, tensors):
            return tensors
    return None


def _hash_tensors(name: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the name of a file and its tensors: their names, shapes and contents."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on every rank. Every rank must call."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in order of rank, on every rank. Every rank must call."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def run_together(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Call `work` on every rank, and return the results of all ranks. Every rank must call.

    If `work` raises OSError on one rank, all ranks raise it, so no rank waits for another in a later collective.
    """
    result, error = None, None
    try:
        result = work()
    except OSError as failure:
        error = (failure.errno, failure.strerror, failure.filename) if failure.strerror else (str(failure),)
    results, errors = zip(*gather_objects((result, error), group), strict=True)
    if failures := [error for error in errors if error]:
        raise OSError(*failures[0])
    return list(results)


def raise_together(error: OptionError | None) -> None:
    """Raise on every rank the first OptionError that a rank has. Every rank must call, with its error or None."""
    for number, message in enumerate(gather_objects(error and str(error))):
        if message:
            raise OptionError(message if number == dist.get_rank() else f"rank {number}: {message}")
