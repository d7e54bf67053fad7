"""Choose a checkpoint, check it against its manifest, and load it under any number of ranks and any strategy."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from transformers import PreTrainedModel

from checkpoint.files import MANIFEST, WEIGHT_FILES, is_ours, list_checkpoints, size_and_hash
from checkpoint.identity import Best, Progress, RunIdentity
from checkpoint.ranks import broadcast_object
from checkpoint.rng import restore_rng, seed_rank
from checkpoint.state import named_parameters, optimizer_state
from config.errors import OptionError
from config.options import Options
from model.export import unique_tensors


def choose_checkpoint(options: Options) -> Path | None:
    """The checkpoint to resume, or None for a new run. Every rank must call; rank 0 looks and decides.

    `auto` takes the newest valid checkpoint of output_dir, and warns about each damaged one that it skips. Raises
    OptionError on every rank for a path that is no valid checkpoint, or if all checkpoints are damaged.
    """
    chosen, error = broadcast_object(_look_for_checkpoint(options) if dist.get_rank() == 0 else None)
    if error:
        raise OptionError(error)
    return Path(chosen) if chosen else None


def _look_for_checkpoint(options: Options) -> tuple[str | None, str | None]:
    wanted = options.resume_from_checkpoint
    if wanted is None:
        return None, None
    if wanted != "auto":
        found = problems(Path(wanted))
        remedy = "pass --resume_from_checkpoint auto, or another checkpoint"
        if found and Path(wanted).is_dir() and not is_ours(Path(wanted)):
            remedy = "another trainer wrote it; to start from a model of it, pass its weights as --model_name_or_path"
        return wanted, f"resume_from_checkpoint {wanted}: no valid checkpoint: {found[0]}\n{remedy}" if found else None
    candidates = list_checkpoints(Path(options.output_dir))
    for path in candidates:
        found = problems(path)
        if not found:
            return str(path), None
        print(f"warning: {path}: damaged, trying the one before it: {found[0]}", file=sys.stderr, flush=True)
    finished = any(list(Path(options.output_dir).glob(pattern)) for pattern in WEIGHT_FILES)
    if not candidates and finished and not options.overwrite_output_dir:
        return None, (
            f"resume_from_checkpoint auto: {options.output_dir} holds a finished model but no checkpoint to resume\n"
            "pass another --output_dir, or --overwrite_output_dir instead, to start a new run"
        )
    if candidates:
        return None, (
            f"resume_from_checkpoint auto: all {len(candidates)} checkpoints of {options.output_dir} are damaged\n"
            "pass another --output_dir, or --overwrite_output_dir instead, to start a new run"
        )
    return None, None


def problems(path: Path) -> list[str]:
    """The differences between a checkpoint and its manifest, in words; empty for a valid one. Reads every byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
            actual = dict(zip(manifest, threads.map(lambda name: size_and_hash(path / name), manifest), strict=True))
    except FileNotFoundError as error:
        return [f"{error.filename} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    return [f"{path / name} is not what was saved" for name in manifest if manifest[name] != actual[name]]


def load_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    identity: RunIdentity,
) -> Progress:
    """Load parameters and optimizer state in place, and restore each rank's RNG. Every rank must call.

    Returns how far the run was. The tensors are resharded to the current topology. With another number of ranks, each
    RNG is seeded from seed, step and rank instead. Raises OptionError if the checkpoint belongs to another identity.
    """
    state = json.loads((path / "state.json").read_text())
    saved = state["progress"]
    for field in dataclasses.fields(RunIdentity):
        was, now = saved[field.name], getattr(identity, field.name)
        if was != now:
            remedy = field.metadata["remedy"].format(was)
            raise OptionError(f"resume_from_checkpoint {path}: {field.name} was {was} and is {now} now\n{remedy}")
    # A checkpoint of an older version lacks the newest fields.
    known = [field.name for field in dataclasses.fields(Progress) if field.name in saved]
    progress = Progress(**{name: saved[name] for name in known} | {"best": Best(**saved.get("best", {}))})

    moments, _ = optimizer_state(optimizer)
    for name, tensors in (("model", unique_tensors(model)), ("optimizer", moments)):
        load_tensors(path / name, tensors)
    parameters = named_parameters(optimizer)
    for name, step in state["optimizer_steps"].items():
        optimizer.state[parameters[name]]["step"].fill_(step)

    rank = dist.get_rank()
    if len(state["rng"]) == dist.get_world_size():
        restore_rng(state["rng"][rank])
    else:
        seed_rank(identity.seed, progress.step, rank)
    return progress


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load `model/` or `optimizer/` of a checkpoint into `tensors`, in place. Every rank must call."""
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
