"""The identity of a run: what must be equal on all ranks, and what a resumed run must not change."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from checkpoint.ranks import broadcast_object, gather_objects
from config.errors import OptionError
from config.options import MAY_DIFFER_BETWEEN_NODES, Options


@dataclasses.dataclass
class Progress:
    """How far a run is, and what it must not change while it goes on."""

    step: int  # optimizer steps done
    tokens_seen: int  # input tokens of those steps, over all ranks
    skipped_steps: int  # those of them that changed nothing, because their gradient was not usable
    global_batch_size: int  # rows of one step; with step and seed it gives the data cursor
    seed: int
    data_fingerprint: str
    model_fingerprint: str
    cursor: list[list[int]] = dataclasses.field(default_factory=list)  # of a stream: the last rows (data/stream.py)
    optim: str = "adamw_torch_fused"  # whose moments they are


def fingerprint_model(model: PreTrainedModel) -> str:
    """SHA-256 over the names and shapes of all parameters. Before or after sharding, it is the same."""
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def fingerprint_weights(model: PreTrainedModel) -> str:
    """SHA-256 over the values of all parameters, on any topology the same. Every rank must call.

    Costs a gather of one parameter after the other, over gloo, and on rank 0 a second for every 2 GB.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu()
        if isinstance(values, DTensor):
            values = values.full_tensor()  # the collective; of GPU tensors, gloo's ends in a segmentation fault
        if dist.get_rank() == 0:
            digest.update(name.encode())
            digest.update(values.numpy().tobytes())
    return broadcast_object(digest.hexdigest())


def require_same_run(options: Options, **facts: Any) -> None:
    """Every rank must call. Raises OptionError on all of them, unless all were given the same job and directory.

    The same job: all options but those of a host, and `facts`, by name. Else ranks would wait for each other in
    different collectives, learn from other rows than they should, or write a checkpoint that no host has whole.
    """
    job = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in MAY_DIFFER_BETWEEN_NODES
    } | facts
    sees_lock = (Path(options.output_dir) / ".lock").exists()
    jobs, sights = zip(*gather_objects((job, sees_lock)), strict=True)
    if others := [rank for rank, other in enumerate(jobs) if other != jobs[0]]:
        different = [name for name in job if any(other[name] != jobs[0][name] for other in jobs)]
        raise OptionError(
            f"ranks {others}: not the same as on rank 0: {', '.join(different)}\n"
            "give all ranks the same options, files and Python version"
        )
    if blind := [rank for rank, sees in enumerate(sights) if not sees]:
        raise OptionError(
            f"output_dir {options.output_dir}: ranks {blind} do not see what rank 0 writes there\n"
            "give a directory that all hosts share"
        )
