"""Python objects and file work over all ranks: every rank must call, and all see the same result or error."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.files import (
    fsync_and_hash,
)
from config.errors import OptionError


def compute_once(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, or gave in the run that left it in `path`. Every rank must call, and gets the same.

    For tensors on the CPU. Rank 0 alone reads and writes. Raises OptionError on all ranks if it cannot write.
    """
    found = broadcast_object(load_file(path) if dist.get_rank() == 0 and path.exists() else None)
    if found is not None:
        return found
    computed = compute()

    def write() -> None:
        if dist.get_rank() == 0:
            beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            save_file(computed, beside)
            fsync_and_hash(beside)
            os.replace(beside, path)

    try:
        run_together(write)
    except OSError as error:
        raise OptionError(f"{path}: it cannot be written: {error}; pass a --data_cache_dir with room") from error
    return computed


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def run_together(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on every rank, by rank. If it fails on one, all raise its OSError: nobody waits for it."""
    result, error = None, None
    try:
        result = work()
    except OSError as failure:
        error = str(failure)
    results, errors = zip(*gather_objects((result, error), group), strict=True)
    if failures := [error for error in errors if error]:
        raise OSError(failures[0])
    return list(results)
