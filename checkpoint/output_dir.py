"""The output directory: claimed by one run at a time, and cleaned of what an older run left."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from checkpoint.files import UNFINISHED, is_ours, list_checkpoints, prune, step_of
from checkpoint.ranks import broadcast_object, gather_objects, run_together
from config.errors import OptionError, writing
from config.options import Options
from model.export import METADATA
from runtime.files import regular_file

# The files of a run whose contents say who wrote them, ...
REPLACED = r"checkpoint-\d+|metrics\.jsonl|model(-\d+-of-\d+)?\.safetensors"
WRITTEN = (
    rf"{REPLACED}|\.lock|ledger|tensorboard|trace|hang|\.(saving|exporting|meeting)-.*"  # what a run creates or opens
)
# ... the other files of an exported model, and those that a run writes during training.
EXPORTED = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
LOGS = (
    *("ledger/rank-*.jsonl", "ledger/about.json", "tensorboard/events.out.tfevents.*", "trace/steps-*.json"),
    *("hang*/rank-*", "hang*/nccl-trace-rank-*"),
)

NOT_SHARED = "not shared"
APPEARS = 5.0  # the seconds that a new file may take to appear on another node, whose file system caches directories

CHECKPOINTS_OF_OTHERS = (
    "checkpoint-[0-9]*",  # transformers, TRL, LLaMA-Factory
    *("checkpoint_[0-9]*", "checkpoints/checkpoint_[0-9]*", "epoch_[0-9]*", "step_[0-9]*"),  # accelerate, torchtune
    *("step-[0-9]*", "checkpoint/step-[0-9]*"),  # torchtitan
    *("global_step[0-9]*", "latest"),  # DeepSpeed
    *("*.ckpt", "checkpoints/*.ckpt", "lightning_logs/*/checkpoints/*.ckpt"),  # Lightning
    *("iter_[0-9]*", "latest_checkpointed_iteration.txt", "latest.txt"),  # Megatron-LM, nanotron
    *(".metadata", "*.distcp", "*/*.distcp"),  # torch.distributed.checkpoint
)


def claim_output_dir(options: Options, rank: int) -> IO[str] | None:
    """Refuse a directory in which a run would replace files. Every rank calls: without torchrun, none ends the others.

    Rank 0 creates output_dir if needed, and locks it against a second run until the returned file is closed. Deletes
    nothing. Raises OptionError if the directory cannot be written, is in use, holds a run that is neither resumed nor
    overwritten, or holds files of another program.
    """
    output_dir = Path(options.output_dir)
    _refuse_links(output_dir)
    lock = _lock(output_dir) if rank == 0 else None
    checkpoints = _checkpoints_of_others(output_dir)
    if options.resume_from_checkpoint == "auto" and checkpoints and not list_checkpoints(output_dir):
        raise OptionError(
            f"resume_from_checkpoint auto: {output_dir} has checkpoints of another trainer, which cannot be resumed "
            f"here: {_names(checkpoints)}\npass another --output_dir; to start from a model of the other trainer, pass "
            "the directory of its weights as --model_name_or_path"
        )
    ours, others = _run_files(output_dir)
    if others:
        raise OptionError(
            f"output_dir {output_dir}: this trainer did not write {_names(others)}, and a run would replace them\n"
            "pass another --output_dir"
        )
    resumed = options.resume_from_checkpoint
    if ours and resumed and resumed != "auto" and Path(resumed).resolve().parent != output_dir.resolve():
        raise OptionError(
            f"output_dir {output_dir}: it holds another run than {resumed}\n"
            "pass another --output_dir, or --resume_from_checkpoint auto to continue the run that it holds"
        )
    if ours and not (resumed or options.overwrite_output_dir):
        raise OptionError(
            f"output_dir {output_dir}: it holds a run already; pass another directory, or\n"
            "--resume_from_checkpoint auto to continue that run, or --overwrite_output_dir to replace it"
        )
    return lock


def _refuse_links(output_dir: Path) -> None:
    """Refuse a link, a pipe or a device where a run writes: a link would lead elsewhere. output_dir may be a link."""
    for directory in (output_dir, *(output_dir / name for name in ("ledger", "tensorboard", "trace", "hang"))):
        for path in directory.iterdir() if directory.is_dir() else []:
            if directory == output_dir and not (re.fullmatch(WRITTEN, path.name) or path.name in EXPORTED):
                continue
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "no file"
                raise OptionError(
                    f"output_dir {output_dir}: {path.relative_to(output_dir)} is {kind}, and a run would write there\n"
                    "remove it, or pass another --output_dir"
                )


def _lock(output_dir: Path) -> IO[str]:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(regular_file(str(output_dir / ".lock"), os.O_WRONLY | os.O_CREAT), "w")
    except OSError as error:
        raise OptionError(f"output_dir {output_dir}: {error.strerror}; pass a directory that can be written") from error
    try:
        # A record lock ends with this process. A lock of flock would be inherited by forked loader workers.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OptionError(f"output_dir {output_dir}: another run writes to it; pass another directory") from error
    except OSError as error:
        raise OptionError(
            f"output_dir {output_dir}: it cannot be locked: {error.strerror}; pass another directory"
        ) from error
    return lock


def require_shared(output_dir: Path) -> None:
    """Refuse an output_dir that is not one directory for all ranks, or that a rank cannot write. Every rank must call.

    Rank 0 creates a directory with a random name, and each rank a file in it. The other ranks must see the directory,
    and rank 0 the files: fixed names could come from an older run on that node. Raises OptionError on all ranks.
    """
    rank, here = dist.get_rank(), f"{socket.gethostname()}:{output_dir.absolute()}"
    meeting = output_dir / broadcast_object(f".meeting-{uuid.uuid4().hex}")
    problem = _failure_of(meeting.mkdir) if rank == 0 else ""
    if not broadcast_object(problem):
        seen = _appears(meeting, time.monotonic() + APPEARS)
        problem = _failure_of((meeting / str(rank)).touch) if seen else NOT_SHARED
    problems, places = map(list, zip(*gather_objects((problem, here)), strict=True))
    if rank == 0:
        deadline = time.monotonic() + APPEARS
        for number in range(len(problems) if not problem else 0):
            if not problems[number] and not _appears(meeting / str(number), deadline):
                problems[number] = NOT_SHARED
        shutil.rmtree(meeting, ignore_errors=True)
    problems = broadcast_object(problems)
    found = next(filter(None, problems), "")
    ranks = [number for number, problem in enumerate(problems) if problem == found]
    where = ", ".join(sorted({places[number] for number in ranks})[:3])
    if found == NOT_SHARED:
        raise OptionError(
            f"output_dir {output_dir}: ranks {ranks} and rank 0 do not see what the other writes there\n"
            f"rank 0 writes to {places[0]}; they write to {where}\n"
            "pass a directory that all nodes share"
        )
    if found:
        raise OptionError(
            f"output_dir {output_dir}: ranks {ranks} cannot write to {where}: {found}\n"
            "make room, let all nodes write to it, or pass another --output_dir"
        )


def _failure_of(work: Callable[[], None]) -> str:
    """The error of the operating system in `work`, in words; "" if there is none."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _appears(path: Path, deadline: float) -> bool:
    """Whether a new path is visible, or becomes so until `deadline` (time.monotonic)."""
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # a network file system reads the directory again
    return True


def clean_output_dir(options: Options, step: int, best_step: int = 0) -> None:
    """Prepare output_dir for a run that starts after `step`. Every rank must call, after all checks have passed.

    A new run with --overwrite_output_dir removes the files of the old run, and no others. A resumed run renames the
    checkpoints beyond its step, because they are damaged or belong to a future that it will replace. It also finishes
    an interrupted pruning. Only rank 0 does this. Raises OptionError on all ranks if it fails.
    """
    with writing(Path(options.output_dir)):
        run_together(lambda: _clean(options, step, best_step) if dist.get_rank() == 0 else None)


def _clean(options: Options, step: int, best_step: int) -> None:
    output_dir = Path(options.output_dir)
    if step == 0 and options.overwrite_output_dir:
        for path in _run_files(output_dir)[0]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in _glob(output_dir, "ledger", "tensorboard", "trace", "hang*"):
            with contextlib.suppress(OSError):  # it holds files of the user
                path.rmdir()
    for path in list_checkpoints(output_dir):
        if step_of(path) > step:
            path.rename(output_dir / f"{path.name}-put-aside-{uuid.uuid4().hex[:8]}")
    prune(output_dir, options.save_total_limit, best_step)


def _run_files(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """What this trainer wrote, and what others wrote that a run would replace. Files with other names are neither.

    The names are common, so contents decide: of checkpoints, weights and metrics. The small files of an exported model
    do not say who wrote them. They belong to a run of this trainer if there is one. The last files to remove are those
    that say so.
    """
    names = ("checkpoint-*", "metrics.jsonl", "*.safetensors")
    telling = [path for path in _glob(output_dir, *names) if re.fullmatch(REPLACED, path.name)]
    ours = [path for path in telling if _is_ours(path)]
    others = [path for path in telling if path not in ours]
    exported = _glob(output_dir, *EXPORTED)
    if ours:
        ours = [*exported, *_glob(output_dir, *LOGS), *ours]
    else:
        others += exported
    return [*_glob(output_dir, *UNFINISHED), *ours], others


def _is_ours(path: Path) -> bool:
    """Whether this trainer wrote a checkpoint, a file of weights or a file of metrics."""
    if path.is_dir():
        return step_of(path) >= 0
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return METADATA.items() <= (file.metadata() or {}).items()
        with open(path, opener=regular_file) as file:
            first = file.readline(2**16)
            return "tokens_seen" in json.loads(first or '"tokens_seen"')  # an empty file has no records yet
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError):
        return False


def _checkpoints_of_others(output_dir: Path) -> list[Path]:
    """Paths with the names of other trainers' checkpoints, without the renamed checkpoints of this one."""
    named = _glob(output_dir, *CHECKPOINTS_OF_OTHERS)
    return [path for path in named if not (path.name.startswith("checkpoint-") and is_ours(path))]


def _glob(output_dir: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in output_dir.glob(pattern)})


def _names(paths: list[Path]) -> str:
    """The names of up to three paths, for a message."""
    return ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
