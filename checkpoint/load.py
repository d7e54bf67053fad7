"""Choose a checkpoint, check it against its manifest, and load it under any number of ranks and any strategy."""

import dataclasses
import math
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from checkpoint.files import MANIFEST, WEIGHT_FILES, is_ours, list_checkpoints, read_manifest, size_and_hash
from checkpoint.identity import Best, Progress, RunIdentity, read_state
from checkpoint.ranks import broadcast_object, gather_objects
from checkpoint.rng import restore_rng, seed_rank
from checkpoint.state import named_parameters, optimizer_state
from config.errors import OptionError, first_line
from config.options import Options
from model.export import checkpoint_tensors
from runtime.files import regular_file, require_readable

# Options that decide what adapters are. Names in lora_target_modules may differ and mean the same modules.
ADAPTERS = ("use_peft", "lora_r", "lora_alpha", "use_rslora")
HELP = "see docs/troubleshooting.md#resume-refused"
OTHER_CHECKPOINT = f"pass --resume_from_checkpoint auto, or another checkpoint; {HELP}"


def choose_checkpoint(options: Options) -> Path | None:
    """The checkpoint to resume, or None for a new run. Every rank must call; rank 0 looks and decides.

    `auto` takes the newest valid checkpoint of output_dir, and warns about each damaged one that it skips. Raises
    OptionError on every rank for a path that is no valid checkpoint, or if all checkpoints are damaged.
    """
    chosen, error = broadcast_object(_look_for_checkpoint(options) if dist.get_rank() == 0 else None)
    if error:
        raise OptionError(error)
    if not chosen:
        return None
    seen = gather_objects(_manifest_seen(Path(chosen)))
    if blind := [rank for rank, manifest in enumerate(seen) if not manifest or manifest != seen[0]]:
        raise OptionError(
            f"resume_from_checkpoint {chosen}: ranks {blind} do not see there what rank 0 sees\n"
            "pass a checkpoint in a directory that all nodes share"
        )
    return Path(chosen)


def _look_for_checkpoint(options: Options) -> tuple[str | None, str | None]:
    try:
        chosen, error = _look(options, options.resume_from_checkpoint)
        if chosen and not error:
            _require_same_adapters(options, Path(chosen))
        return chosen, error
    except OptionError as error:
        return None, str(error)


def _look(options: Options, wanted: str | None) -> tuple[str | None, str | None]:
    if wanted is None:
        return None, None
    if wanted != "auto":
        require_readable("resume_from_checkpoint", Path(wanted), "**/*")
        found = problems(Path(wanted))
        remedy = OTHER_CHECKPOINT
        if found and Path(wanted).is_dir() and not is_ours(Path(wanted)):
            remedy = "another trainer wrote it; to start from a model of it, pass its weights as --model_name_or_path"
        return wanted, f"resume_from_checkpoint {wanted}: no valid checkpoint: {found[0]}\n{remedy}" if found else None
    candidates = list_checkpoints(Path(options.output_dir))
    for path in candidates:
        require_readable("resume_from_checkpoint", path, "**/*")  # `problems` would take it for damaged
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
            f"pass another --output_dir, or --overwrite_output_dir instead, to start a new run; {HELP}"
        )
    return None, None


def _require_same_adapters(options: Options, path: Path) -> None:
    """Refuse a checkpoint of other adapters by the name of the option. Its fingerprint alone would say no more."""
    saved = read_state(path)["options"]
    for name in ADAPTERS:
        was, now = saved.get(name, getattr(options, name)), getattr(options, name)
        if was != now:
            value = str(was).lower() if isinstance(was, bool) else was
            raise OptionError(
                f"resume_from_checkpoint {path}: {name} was {was} and is {now} now\npass --{name} {value}; {HELP}"
            )


def problems(path: Path) -> list[str]:
    """The differences between a checkpoint and its manifest, in words; empty for a valid one. Reads every byte."""
    try:
        manifest = read_manifest(path)
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
            intact = list(threads.map(lambda name: _is_intact(path / name, manifest[name]), manifest))
        if not all(intact):
            return [f"{path / name} is not what was saved" for name, ok in zip(manifest, intact, strict=True) if not ok]
        read_state(path)
    except FileNotFoundError as error:
        return [f"{error.filename} is missing"]
    except OSError as error:
        return [f"{error.filename or path} cannot be read: {error.strerror or error}"]
    except ValueError as error:
        return [first_line(error)]
    return []


def _is_intact(path: Path, entry: Any) -> bool:
    """Whether a file is what its entry in a manifest says. A file of another size is not read. Raises OSError."""
    with open(path, "rb", opener=regular_file) as file:
        size = os.fstat(file.fileno()).st_size
    return isinstance(entry, dict) and entry.get("bytes") == size and entry == size_and_hash(path)


def _manifest_seen(path: Path) -> str:
    """The SHA-256 of a checkpoint's manifest; "" unless this rank sees all its files, with the sizes that it says."""
    try:
        manifest = read_manifest(path)
        if any((path / name).stat().st_size != entry["bytes"] for name, entry in manifest.items()):
            return ""
        return size_and_hash(path / MANIFEST)["sha256"]
    except (OSError, ValueError):
        return ""


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
    state, error = broadcast_object(_read_state_or_error(path) if dist.get_rank() == 0 else None)
    if error:
        raise OptionError(f"resume_from_checkpoint {path}: {error}\n{OTHER_CHECKPOINT}")
    saved = state["progress"]
    for field in dataclasses.fields(RunIdentity):
        was, now = saved[field.name], getattr(identity, field.name)
        if was != now:
            remedy = field.metadata["remedy"].format(was)
            raise OptionError(
                f"resume_from_checkpoint {path}: {field.name} was {was} and is {now} now\n{remedy}; {HELP}"
            )
    # A checkpoint of an older version lacks the newest fields.
    known = [field.name for field in dataclasses.fields(Progress) if field.name in saved]
    progress = Progress(**{name: saved[name] for name in known} | {"best": Best(**saved.get("best", {}))})

    moments, steps = optimizer_state(optimizer)
    load_tensors(path / "model", checkpoint_tensors(model))
    load_tensors(path / "optimizer", moments, convert=True)  # optim_state_dtype may differ
    parameters = named_parameters(optimizer)
    if state["optimizer_steps"].keys() != steps.keys():
        raise OptionError(f"resume_from_checkpoint {path}: its optimizer had other parameters\n{OTHER_CHECKPOINT}")
    for name, step in state["optimizer_steps"].items():
        optimizer.state[parameters[name]]["step"].fill_(step)

    rank = dist.get_rank()
    if len(state["rng"]) == dist.get_world_size():
        restore_rng(state["rng"][rank])
    else:
        seed_rank(identity.seed, progress.step, rank)
    return progress


def _read_state_or_error(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_state(path), ""
    except (OSError, ValueError) as error:
        return {}, first_line(error)


def load_tensors(folder: Path, tensors: dict[str, Tensor], convert: bool = False) -> None:
    """Load `model/` or `optimizer/` of a checkpoint into `tensors`, in place. Every rank must call.

    Raises OptionError on all ranks if a tensor is missing there, or has another shape or dtype. With `convert`, fp32
    and bf16 become the dtype of the tensor, rounded to the nearest number. Other tensors than `tensors` are not read.
    """
    try:
        if misfit := broadcast_object(_misfit(folder, tensors, convert) if dist.get_rank() == 0 else ""):
            raise OptionError(f"{folder}: {misfit}\n{OTHER_CHECKPOINT}")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as failed:  # no Exception; every rank gets the errors of all
        causes = [first_line(error) for error, _ in failed.failures.values() if isinstance(error, Exception)]
        raise OptionError(f"{folder}: it cannot be loaded: {min(causes)}\n{OTHER_CHECKPOINT}") from failed


def _misfit(folder: Path, tensors: dict[str, Tensor], convert: bool) -> str:
    """The first of `tensors` that the headers of the files in `folder` do not hold in full, in words; or ""."""
    found: dict[str, int] = defaultdict(int)  # numbers of each tensor, in all shards
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys() & tensors.keys():
                    view = file.get_slice(name)
                    fitting = {tensors[name].dtype, *((torch.float32, torch.bfloat16) if convert else ())}
                    if str_to_torch_dtype.get(view.get_dtype()) not in fitting:
                        return f"{name} is {view.get_dtype()} in {path.name}, and {tensors[name].dtype} in this run"
                    found[name] += math.prod(view.get_shape())
    except (OSError, SafetensorError) as error:
        return f"{path.name} is damaged: {first_line(error)}"
    for name, tensor in tensors.items():
        if found[name] != tensor.numel():
            return f"it holds {found[name]:,} of the {tensor.numel():,} numbers of {name}"
    return ""
