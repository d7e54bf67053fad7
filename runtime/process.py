"""Process start and exit: the libraries, the errors of a run, and the exit code."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
import transformers

from config.errors import OptionError, first_line
from runtime.network import choose_interface, network_failure
from runtime.signals import SAVE_SIGNALS


def configure_libraries(full_determinism: bool) -> None:
    """Choose gloo's network interface, silence transformers, and restrict torch to deterministic algorithms if asked.

    Call before the GPU is used and before the ranks meet.
    """
    choose_interface()
    transformers.utils.logging.disable_progress_bar()  # the training loop has one
    transformers.utils.logging.set_verbosity_error()  # they are expected, or our checks raise errors
    if full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may choose another algorithm
        torch.use_deterministic_algorithms(True)


def run(main: Callable[[list[str]], None], explain_out_of_memory: Callable[[list[str], Exception], str]) -> NoReturn:
    """Call `main` with the command line, print its error, and exit: 0, 1 for a program error, 2 for a user error.

    Other ranks wait before they print, because rank 0 prints for all: torchrun ends them as soon as rank 0 has exited.
    `explain_out_of_memory` returns an explanation, or "" for any other error.
    """
    for number in SAVE_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # nothing to save before the loop; by default, they would end the process
    try:
        main(sys.argv[1:])
    except Exception as error:
        mistake = error if isinstance(error, OptionError) else _mistake(error)
        explanation = f"error: {mistake}" if mistake else explain_out_of_memory(sys.argv[1:], error)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        if explanation:
            print(f"train.py: {explanation}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        exit_process(2 if mistake else 1)
    exit_process(0)


def _mistake(error: Exception) -> OptionError | None:
    """The mistake of the user that an error of the system comes from: a full disk, or ranks that do not meet; or None.

    A file that a run writes during training has a better message, with its path (config/errors.py: writing).
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OptionError(
            f"{error.filename or 'a file'}: {error.strerror}\n"
            "make room in output_dir, in data_cache_dir and for temporary files"
        )
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


def exit_process(exit_code: int) -> NoReturn:
    """Exit with `os._exit`, without Python's teardown and without destroy_process_group.

    Both destroy gloo's process group while they hold the interpreter's lock, and wait for gloo's threads. A thread may
    need that lock at the same moment, to release a tensor. About one run in a hundred hung or aborted this way. The
    operating system frees everything: files are closed, and all ranks have passed the last barrier.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
