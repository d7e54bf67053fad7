"""Process start and exit: the libraries, the errors of a run, and the exit code."""

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import transformers

from config.errors import BROKEN, DENIED, OptionError, first_line, unusable
from runtime.garbage import leave_garbage_to_parent
from runtime.gpus import require_usable_gpu
from runtime.hang.watch import ACTIVITY, explain_failure
from runtime.launcher import rank_from_environment, tell_torchrun
from runtime.network import choose_interface, network_failure
from runtime.parent import follow_launcher
from runtime.peers import Peers, join
from runtime.signals import answer_signals


def configure_libraries(full_determinism: bool, recordings: str | None) -> None:
    """Require a usable GPU, choose gloo's interface, silence transformers, and make torch deterministic if asked.

    Call before the GPU is used and before the ranks meet. With a directory for `recordings`, NCCL writes its last
    collectives there when one times out (runtime/hang/watch.py).
    """
    require_usable_gpu()
    choose_interface()
    transformers.utils.logging.disable_progress_bar()  # the training loop has one
    transformers.utils.logging.set_verbosity_error()  # they are expected, or our checks raise errors
    if full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may choose another algorithm
        torch.use_deterministic_algorithms(True)
    if recordings:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives of each rank
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{recordings}/hang/nccl-trace-rank-")


def run(main: Callable[[list[str]], int], explain_out_of_memory: Callable[[list[str], Exception], str]) -> NoReturn:
    """Call `main` with the command line, print its error, and exit: with its code, 1 (program error) or 2 (user error).

    Other ranks wait before they print, because rank 0 prints for all: torchrun ends them as soon as rank 0 has exited.
    `explain_out_of_memory` returns an explanation, or "" for any other error.
    """
    follow_launcher()
    leave_garbage_to_parent()
    signals = answer_signals()
    peers: Peers | None = None
    try:
        rank_from_environment()
        peers = join()
        signals.tell_ranks = peers.report
        exit_code = main(sys.argv[1:])
        if exit_code:
            tell_torchrun("stopped by a signal; continue with --resume_from_checkpoint auto")
    except Exception as error:
        if peers:
            peers.end_if_signaled()
        if explain_failure(error):  # another rank is the cause, and a message names it
            _tell("another rank failed, or was not reached")
            exit_process(1)
        mistake = error if isinstance(error, OptionError) else _mistake(error)
        if signals.stop and not mistake and isinstance(error, RuntimeError) and dist.is_initialized():
            # Ranks that had the signal before their loop have ended at once, so a collective of this one failed.
            text = f"{first_line(error)}; continue with --resume_from_checkpoint auto"
            print(f"train.py: a signal ended the run before its checkpoint: {text}", file=sys.stderr)
            exit_process(signals.exit_code())
        explanation = f"error: {mistake}" if mistake else explain_out_of_memory(sys.argv[1:], error)
        exit_code = 2 if mistake else 1
        _tell(str(mistake or explanation) or f"{type(error).__name__}: {first_line(error)}")
        if peers:
            peers.report(str(mistake or explanation) or f"{type(error).__name__}: {first_line(error)}", exit_code)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        if explanation:
            print(f"train.py: {explanation}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        if peers:
            peers.linger()
    exit_process(exit_code)


def _tell(failure: str) -> None:
    """Tell torchrun, and what records the run, of its failure; it has begun if rank 0 has begun to write."""
    tell_torchrun(failure)
    if ACTIVITY.report_failure is not None:
        with contextlib.suppress(Exception):  # the failure itself may be a disk that cannot be written
            ACTIVITY.report_failure(failure[:1000])


def _mistake(error: Exception) -> OptionError | None:
    """The mistake of the user that an error of the system comes from: a full disk, or ranks that do not meet; or None.

    A file that a run writes during training has a better message, with its path (config/errors.py: writing).
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OptionError(
            f"{error.filename or 'a file'}: {error.strerror}\n"
            "make room in output_dir, in data_cache_dir and for temporary files"
        )
    if isinstance(error, OSError) and (error.errno in BROKEN or (error.errno in DENIED and error.filename)):
        return unusable(_option_of(str(error.filename or "")), "a file", error)
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError) and not dist.is_initialized():
        place = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            return OptionError(f"{place}: this port is in use\nset another MASTER_PORT, the same for all ranks")
        return OptionError(
            f"{place}: {os.environ['WORLD_SIZE']} ranks did not meet there: {first_line(error)}\n"
            "start all ranks, and set both variables to an address and a free port of the node of rank 0, for all ranks"
        )
    if isinstance(error, RuntimeError) and not dist.is_initialized() and (failure := network_failure(error)):
        return OptionError(failure)
    return None


def at_exit(function: Callable[[int], None]) -> None:
    """Call `function` with the exit code before this process exits by itself, whatever its end: `atexit` never runs."""
    _at_exit.append(function)


_at_exit: list[Callable[[int], None]] = []


def _option_of(path: str) -> str:
    """The option of the command line whose value is `path` or a directory above it; "" if none is."""
    for word, value in zip(sys.argv[1:], sys.argv[2:], strict=False):
        if word.startswith("--") and Path(path).absolute().is_relative_to(Path(value).absolute()):
            return word.removeprefix("--")
    return ""


def exit_process(exit_code: int) -> NoReturn:
    """Exit with `os._exit`, without Python's teardown and without destroy_process_group.

    Both destroy gloo's process group while they hold the interpreter's lock, and wait for gloo's threads. A thread may
    need that lock at the same moment, to release a tensor. About one run in a hundred hung or aborted this way. The
    operating system frees everything: files are closed, and all ranks have passed the last barrier.
    """
    for function in _at_exit:
        with contextlib.suppress(Exception):  # they report, and change no exit code
            function(exit_code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a log file, on a full disk
            stream.flush()
    os._exit(exit_code)
