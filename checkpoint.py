"""Save, choose, load and export: atomic, without pickle, and independent of the number of ranks and the strategy.

    output_dir/checkpoint-STEP/
        model/shard-*.safetensors      parameters, fp32; each rank wrote its part
        optimizer/shard-*.safetensors  AdamW's two moments of each parameter; Muon's one
        state.json                     step, data cursor, RNG of every rank, fingerprints, options, versions
        manifest.json                  size and SHA-256 of every other file, written last

A checkpoint is written into a temporary directory, synced to the disk and renamed: it is there whole or not at all.
All functions that say so must be called by every rank, with one directory that all ranks see.
"""

import base64
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import OF_A_HOST, OptionError, Options
from model.export import unique_tensors, write_model

MANIFEST = "manifest.json"
LEFT_OVER = (".saving-*", ".exporting-*")  # what was being written when a run was cut off
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


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


# --- The output directory -------------------------------------------------------------------------------------------


def claim_output_dir(options: Options) -> IO[str]:
    """Make sure that this run may write to output_dir, and lock it against a second one while the result is open.

    For rank 0. Deletes nothing. Raises OptionError.
    """
    output_dir = Path(options.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = (output_dir / ".lock").open("w")
    except OSError as error:
        raise OptionError(f"output_dir {output_dir}: {error.strerror}; give a directory that can be written") from error
    try:
        # A record lock: unlike one of flock, it ends with this process, and is not held on by forked loader workers.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OptionError(f"output_dir {output_dir}: another run is writing to it; give another one") from error
    except OSError as error:
        raise OptionError(
            f"output_dir {output_dir}: it cannot be locked: {error.strerror}; give another one"
        ) from error
    if _run_files(output_dir) and not (options.resume_from_checkpoint or options.overwrite_output_dir):
        raise OptionError(
            f"output_dir {output_dir}: it holds a run already; give another one, or\n"
            "--resume_from_checkpoint auto to continue that run, or --overwrite_output_dir to replace it"
        )
    return lock


def make_room(options: Options, step: int) -> None:
    """Make output_dir that of a run which is at `step`. For rank 0, after everything that can be checked was.

    A new run that may overwrite removes what the old one left; files that are no run's stay. A resumed one puts aside,
    under other names, the checkpoints beyond its step: damaged ones, or those of a future that will now be another
    one. And it finishes the pruning that the end of the old one may have cut off.
    """
    output_dir = Path(options.output_dir)
    if step == 0 and options.overwrite_output_dir:
        for path in _run_files(output_dir):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in _checkpoints(output_dir):
        if _step_of(path) > step:
            path.rename(output_dir / f"{path.name}-put-aside-{uuid.uuid4().hex[:8]}")
    _prune(output_dir, options.save_total_limit)


def _run_files(output_dir: Path) -> list[Path]:
    """What a run leaves behind; not the lock, and nothing that a user may have put there."""
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    exported = ("config.json", "generation_config.json", *tokenizer, *WEIGHTS)
    patterns = (*LEFT_OVER, "metrics.jsonl", "ledger", "tensorboard", "trace", *exported)
    return [*_checkpoints(output_dir), *{path for pattern in patterns for path in output_dir.glob(pattern)}]


# --- Saving ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Snapshot:
    """What one rank contributes to a checkpoint, at one moment of training."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    rng: dict[str, str]
    state: dict[str, Any]  # the rest of state.json, the same on all ranks


class Saver:
    """Writes checkpoints in a thread, from a copy, while training goes on. Every rank has one, and calls alike.

    The thread's collectives have a process group of their own: they must not mix with those of the loop.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=options.ddp_timeout))
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[None] | None = None
        self.copies: dict[str, Tensor] = {}

    def save(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write checkpoint-STEP, then remove the oldest ones beyond `save_total_limit`.

        Waits for the checkpoint before, and for the copy; with `async_save` false, for the files too, and saves the
        memory of the copy: 12 bytes a parameter, divided among the ranks. Raises OptionError like `wait`.
        """
        self.wait()
        moments, optimizer_steps = _optimizer_state(optimizer)
        snapshot = Snapshot(
            _share_of_rank(unique_tensors(model)),
            _share_of_rank(moments),
            _rng_state(),
            {
                "progress": dataclasses.asdict(progress),
                "optimizer_steps": optimizer_steps,
                "options": dataclasses.asdict(self.options),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
        )
        if self.options.async_save:
            snapshot.parameters = self._copy(snapshot.parameters)
            snapshot.moments = self._copy(snapshot.moments)
        self.writing = self.thread.submit(_write, snapshot, self.options, self.group)
        if not self.options.async_save:
            self.wait()

    def failed(self) -> bool:
        """Whether the checkpoint that was being written cannot be: the ranks must agree on it, and then `wait`."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises OptionError on all ranks if one could not write it."""
        try:
            if self.writing:
                self.writing.result()
        except (OSError, dcp.CheckpointException) as error:
            failures = getattr(error, "failures", {0: (error, None)})
            causes = {str(cause) for cause, _ in failures.values() if isinstance(cause, OSError)}
            if not causes:
                raise
            raise OptionError(
                f"output_dir {self.options.output_dir}: the checkpoint could not be written: {min(causes)[:200]}\n"
                "make room or give another one; the checkpoint before is intact: --resume_from_checkpoint auto"
            ) from error
        self.writing = None

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory: page-locked, so that a GPU copies fast, and used again for the next save."""
        for name, tensor in tensors.items():
            if name not in self.copies:
                self.copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self.copies[name] for name in tensors}


def _write(snapshot: Snapshot, options: Options, group: dist.ProcessGroup) -> None:
    """Write, sync and rename a checkpoint, then prune. Every rank must call. Raises OSError on all if one fails."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    output_dir = Path(options.output_dir)
    final = output_dir / f"checkpoint-{snapshot.state['progress']['step']}"
    saving = output_dir / _broadcast(f".saving-{uuid.uuid4().hex}", group)
    rng = _gather(snapshot.rng, group)

    def write_state() -> None:
        saving.mkdir(exist_ok=True)
        if rank == 0:
            (saving / "state.json").write_text(json.dumps(snapshot.state | {"rng": rng}, indent=1))

    def sync() -> dict[str, Any]:
        files = sorted(path for path in saving.rglob("*") if path.is_file())
        return {str(path.relative_to(saving)): _sync_and_hash(path) for path in files[rank::world_size]}

    def complete() -> None:
        if rank > 0:
            return
        manifest = {name: digest for part in digests for name, digest in part.items()}
        (saving / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _sync_and_hash(saving / MANIFEST)
        for directory in (saving / "model", saving / "optimizer", saving):
            _sync(directory)
        saving.rename(final)
        _sync(output_dir)
        _prune(output_dir, options.save_total_limit)

    _together(write_state, group)
    for name, tensors in (("model", snapshot.parameters), ("optimizer", snapshot.moments)):
        writer = dcp.HuggingFaceStorageWriter(str(saving / name), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
    digests = _together(sync, group)
    _together(complete, group)


def _prune(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and what saves that were cut off have left."""
    for path in (path for pattern in LEFT_OVER for path in output_dir.glob(pattern)):
        shutil.rmtree(path)
    for path in _checkpoints(output_dir)[limit:] if limit else []:
        # Without its manifest it is no checkpoint any more, wherever the removal may be cut off.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _share_of_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes: its shards, and of the tensors that all ranks hold as many bytes as each of them."""
    loads = [0] * dist.get_world_size()
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        owner = dist.get_rank() if isinstance(tensor, DTensor) else loads.index(min(loads))
        loads[owner] += tensor.numel()
        if owner == dist.get_rank():
            share[name] = tensor.detach()
    return share


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state by parameter name: the moments, in the shape and sharding of the parameter, and AdamW's step count.

    Creates a state of zeros where there is none yet, as the optimizer's own first step would, for `load` to fill.
    """
    moments: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        kinds = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")  # of Muon, of AdamW
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state.update({kind: torch.zeros_like(parameter) for kind in kinds})
                if "momentum" not in group:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments |= {f"{kind}.{name}": state[kind] for kind in kinds}
            if "step" in state:
                steps[name] = state["step"]
    return moments, dict(zip(steps, torch.stack(list(steps.values())).tolist(), strict=True))


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer updates, by name; a sharded one updates a part of each of the model's parameters."""
    groups = optimizer.param_groups
    return {name: part for group in groups for name, part in zip(group["param_names"], group["params"], strict=True)}


def _sync_and_hash(path: Path) -> dict[str, Any]:
    _sync(path)
    return _size_and_hash(path)


def _size_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """A new file is on the disk; the name of one, or a new name, only when the directory that holds it is."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# --- Choosing and loading -------------------------------------------------------------------------------------------


def choose(options: Options) -> Path | None:
    """The checkpoint to resume, or None to start anew. Every rank must call; rank 0 looks and decides.

    `auto` takes the newest valid checkpoint of output_dir, and warns about a damaged one that it passes over. Raises
    OptionError on every rank, for a path that is no valid checkpoint, or when all of them are damaged.
    """
    chosen, error = _broadcast(_look_for_checkpoint(options) if dist.get_rank() == 0 else None)
    if error:
        raise OptionError(error)
    return Path(chosen) if chosen else None


def _look_for_checkpoint(options: Options) -> tuple[str | None, str | None]:
    wanted = options.resume_from_checkpoint
    if wanted is None:
        return None, None
    if wanted != "auto":
        found = problems(Path(wanted))
        remedy = "give --resume_from_checkpoint auto, or another one"
        return wanted, f"resume_from_checkpoint {wanted}: no valid checkpoint: {found[0]}\n{remedy}" if found else None
    candidates = _checkpoints(Path(options.output_dir))
    for path in candidates:
        found = problems(path)
        if not found:
            return str(path), None
        print(f"warning: {path}: damaged, trying the one before it: {found[0]}", file=sys.stderr, flush=True)
    finished = any(list(Path(options.output_dir).glob(pattern)) for pattern in WEIGHTS)
    if not candidates and finished and not options.overwrite_output_dir:
        return None, (
            f"resume_from_checkpoint auto: {options.output_dir} holds a finished model but no checkpoint to resume\n"
            "give --overwrite_output_dir without it to start anew"
        )
    if candidates:
        return None, (
            f"resume_from_checkpoint auto: all {len(candidates)} checkpoints of {options.output_dir} are damaged\n"
            "give --overwrite_output_dir without it to start anew"
        )
    return None, None


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint by its manifest; an empty list if nothing is. Reads every byte of it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
            actual = dict(zip(manifest, threads.map(lambda name: _size_and_hash(path / name), manifest), strict=True))
    except FileNotFoundError as error:
        return [f"{error.filename} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    return [f"{path / name} is not what was saved" for name in manifest if manifest[name] != actual[name]]


def load(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    expected: Progress,
) -> Progress:
    """Restore parameters, optimizer state and, on the same number of ranks, each rank's RNG. Every rank must call.

    Raises OptionError if the run would not be the same one: another model, data, seed, global batch size or optimizer.
    On another number of ranks each RNG is seeded anew from seed, step and rank.
    """
    state = json.loads((path / "state.json").read_text())
    progress = Progress(**state["progress"])
    for name, remedy in (
        ("model_fingerprint", "resume with the model that was trained"),
        ("data_fingerprint", "resume with the data, tokenizer, block_size, packing (and dpo's reference) of that run"),
        ("seed", f"give --seed {progress.seed}"),
        ("global_batch_size", f"give --global_batch_size {progress.global_batch_size}"),
        ("optim", f"give --optim {progress.optim}"),
    ):
        was, now = getattr(progress, name), getattr(expected, name)
        if was != now:
            raise OptionError(f"resume_from_checkpoint {path}: {name} was {was} and is {now} now\n{remedy}")

    moments, _ = _optimizer_state(optimizer)
    for name, tensors in (("model", unique_tensors(model)), ("optimizer", moments)):
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path / name)))  # in place, resharded
    parameters = _named_parameters(optimizer)
    for name, step in state["optimizer_steps"].items():
        optimizer.state[parameters[name]]["step"].fill_(step)

    rank = dist.get_rank()
    if len(state["rng"]) == dist.get_world_size():
        _restore_rng(state["rng"][rank])
    else:
        seed_rank(progress.seed, progress.step, rank)
    return progress


def _checkpoints(output_dir: Path) -> list[Path]:
    """The directories that are named like checkpoints, newest first; valid or not."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _step_of(path) >= 0), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    """The step of a directory that is named like a checkpoint; -1 for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() else -1


# --- Random numbers -------------------------------------------------------------------------------------------------


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed this rank's generators, each rank differently: equal dropout on all ranks would be noise of one rank."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4]))


def _rng_state() -> dict[str, str]:
    """The generators that training draws from: torch's, on the CPU and on this rank's GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def _restore_rng(state: dict[str, str]) -> None:
    states = {
        device: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for device, text in state.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# --- The finished model ---------------------------------------------------------------------------------------------


def export(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model and tokenizer to the root of output_dir, for `from_pretrained`. Every rank must call.

    The files of a model that was there before give way, one by one: an index comes after what it lists.
    """
    output_dir, rank, world_size = Path(options.output_dir), dist.get_rank(), dist.get_world_size()
    exporting = output_dir / _broadcast(f".exporting-{uuid.uuid4().hex}")
    _together(lambda: exporting.mkdir(exist_ok=True))

    def replace() -> None:
        if rank > 0:
            return
        old = {path for pattern in WEIGHTS for path in output_dir.glob(pattern)}
        for path in sorted(path for path in exporting.rglob("*") if path.is_file()):
            _sync(path)
            final = output_dir / path.relative_to(exporting)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)
            old.discard(final)
        for path in old:
            path.unlink()
        _sync(output_dir)

    try:
        dtype = getattr(torch, options.save_dtype)
        write_model(exporting, model, tokenizer, dtype, rank, world_size, _together)
        _together(replace)
    finally:
        shutil.rmtree(exporting, ignore_errors=True)


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
    return _broadcast(digest.hexdigest())


def require_same_job(options: Options, **facts: Any) -> None:
    """Every rank must call. Raises OptionError on all of them, unless all were given the same job and directory.

    The same job: all options but those of a host, and `facts`, by name. Else ranks would wait for each other in
    different collectives, learn from other rows than they should, or write a checkpoint that no host has whole.
    """
    job = {name: value for name, value in dataclasses.asdict(options).items() if name not in OF_A_HOST} | facts
    sees_lock = (Path(options.output_dir) / ".lock").exists()
    jobs, sights = zip(*_gather((job, sees_lock)), strict=True)
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


# --- What later runs need not compute again ------------------------------------------------------------------------


def computed_once(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, or gave in the run that left it in `path`. Every rank must call, and gets the same.

    For tensors on the CPU. Rank 0 alone reads and writes. Raises OptionError on all ranks if it cannot write.
    """
    found = _broadcast(load_file(path) if dist.get_rank() == 0 and path.exists() else None)
    if found is not None:
        return found
    computed = compute()

    def write() -> None:
        if dist.get_rank() == 0:
            beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            save_file(computed, beside)
            _sync_and_hash(beside)
            os.replace(beside, path)

    try:
        _together(write)
    except OSError as error:
        raise OptionError(f"{path}: it cannot be written: {error}; give a --data_cache_dir with room") from error
    return computed


# --- Between ranks --------------------------------------------------------------------------------------------------


def _broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on every rank, by rank. If it fails on one, all raise its OSError: nobody waits for it."""
    result, error = None, None
    try:
        result = work()
    except OSError as failure:
        error = str(failure)
    results, errors = zip(*_gather((result, error), group), strict=True)
    if failures := [error for error in errors if error]:
        raise OSError(failures[0])
    return list(results)
