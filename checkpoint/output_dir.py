"""The output directory: claimed by one run at a time, and cleaned of what an older run left."""

import fcntl
import shutil
import uuid
from pathlib import Path
from typing import IO

from checkpoint.files import UNFINISHED, WEIGHT_FILES, list_checkpoints, prune, step_of
from config.errors import OptionError
from config.options import Options


def claim_output_dir(options: Options) -> IO[str]:
    """Create output_dir if needed, and lock it against a second run until the returned file is closed.

    For rank 0. Deletes nothing. Raises OptionError if the directory cannot be written, is in use, or holds a run that
    is neither resumed nor overwritten.
    """
    output_dir = Path(options.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = (output_dir / ".lock").open("w")
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
    if _run_files(output_dir) and not (options.resume_from_checkpoint or options.overwrite_output_dir):
        raise OptionError(
            f"output_dir {output_dir}: it holds a run already; pass another directory, or\n"
            "--resume_from_checkpoint auto to continue that run, or --overwrite_output_dir to replace it"
        )
    return lock


def clean_output_dir(options: Options, step: int, best_step: int) -> None:
    """Prepare output_dir for a run that starts after `step`. For rank 0, after all checks have passed.

    A new run with --overwrite_output_dir removes the files of the old run, and no others. A resumed run renames the
    checkpoints beyond its step, because they are damaged or belong to a future that it will replace. It also finishes
    an interrupted pruning.
    """
    output_dir = Path(options.output_dir)
    if step == 0 and options.overwrite_output_dir:
        for path in _run_files(output_dir):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in list_checkpoints(output_dir):
        if step_of(path) > step:
            path.rename(output_dir / f"{path.name}-put-aside-{uuid.uuid4().hex[:8]}")
    prune(output_dir, options.save_total_limit, best_step)


def _run_files(output_dir: Path) -> list[Path]:
    """The files of a run, without the lock and without files that a user may have added."""
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    exported = ("config.json", "generation_config.json", *tokenizer, *WEIGHT_FILES)
    patterns = (*UNFINISHED, "metrics.jsonl", "ledger", "tensorboard", "trace", *exported)
    return [*list_checkpoints(output_dir), *{path for pattern in patterns for path in output_dir.glob(pattern)}]
