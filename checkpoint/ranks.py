"""Python objects and file work over all ranks: every rank must call, and all see the same result or error."""

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.files import fsync_and_hash
from config.errors import OptionError


def compute_once(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `compute`, read from `path` if an earlier run has stored it there. Every rank must call.

    All ranks get the same CPU tensors. Only rank 0 reads and writes. A damaged file is computed again. Raises
    OptionError on all ranks if rank 0 cannot write.
    """
    found = None
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, SafetensorError):
            found = load_file(path)
    found = broadcast_object(found)
    if found is not None:
        return found
    computed = compute()

    def write() -> None:
        if dist.get_rank() == 0:
            beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            try:
                save_file(computed, beside)
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
        error = str(failure)
    results, errors = zip(*gather_objects((result, error), group), strict=True)
    if failures := [error for error in errors if error]:
        raise OSError(failures[0])
    return list(results)
