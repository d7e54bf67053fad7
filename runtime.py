"""The life of a process: its rank in the environment, the signals that stop it, and its exit."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch
import transformers

from config.errors import OptionError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def rank_from_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank from the variables that torchrun sets; without torchrun, rank 0 of 1."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def listen_for_stop_signals() -> threading.Event:
    """An event that SIGTERM or Ctrl-C sets, so that the loop ends after its step. A second signal ends the process."""
    stop_requested = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop_requested.set()
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)

    for stop in STOP_SIGNALS:
        signal.signal(stop, request)
    return stop_requested


def ignore_stop_signals(worker: int) -> None:
    """For a worker of the data loader: a signal reaches its whole process group, but the step still needs its data."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)


def configure_libraries(full_determinism: bool) -> None:
    """Silence transformers, and restrict torch to deterministic algorithms if asked. Call before the GPU is used."""
    transformers.utils.logging.disable_progress_bar()  # the training loop has one
    transformers.utils.logging.set_verbosity_error()  # its warnings are errors here, or intended
    if full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may choose another algorithm
        torch.use_deterministic_algorithms(True)


def run(main: Callable[[list[str]], None], explain_out_of_memory: Callable[[list[str], Exception], str]) -> NoReturn:
    """Call `main` with the command line, print its error, and exit: 0, 1 for a fault, 2 for a user's mistake.

    Other ranks wait before they print, because rank 0 prints for all: torchrun ends them as soon as rank 0 has exited.
    `explain_out_of_memory` returns an explanation, or "" for any other error.
    """
    try:
        main(sys.argv[1:])
    except Exception as error:
        explanation = (
            f"error: {error}" if isinstance(error, OptionError) else explain_out_of_memory(sys.argv[1:], error)
        )
        if not explanation:
            traceback.print_exc()
            exit_process(1)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        print(f"train.py: {explanation}", file=sys.stderr)
        exit_process(2 if isinstance(error, OptionError) else 1)
    exit_process(0)


def exit_process(exit_code: int) -> NoReturn:
    """Exit with `os._exit`, without Python's teardown and without destroy_process_group.

    Both destroy gloo's process group while they hold the interpreter's lock, and wait for gloo's threads. A thread may
    need that lock at the same moment, to release a tensor. About one run in a hundred hung or aborted this way. The
    operating system frees everything: files are closed, and all ranks have passed the last barrier.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
