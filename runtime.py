"""The life of a process: what the launcher says of its rank, the signals that stop it, and its exit."""

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
    """Rank, world size and rank on this host, as torchrun sets them; alone, the only process is rank 0 of 1."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def listen_for_stop_signals() -> threading.Event:
    """An event that SIGTERM or Ctrl-C sets: the step is finished and saved. A second signal ends the process."""
    stop_requested = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop_requested.set()
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)

    for stop in STOP_SIGNALS:
        signal.signal(stop, request)
    return stop_requested


def ignore_stop_signals(worker: int) -> None:
    """For a worker process of a loader: signals reach whole process groups, but the step still needs its rows."""
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
    """Call `main` with the command line, report how it ended, and exit: 0, 1 for a fault, 2 for a user's mistake.

    Rank 0 speaks for all ranks: torchrun ends the others as soon as rank 0 has ended, so they wait before they speak.
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
    """End the process, and leave the rest to the operating system: files are closed, peers have passed the barrier.

    There is no destroy_process_group, and no teardown by Python: both destroy gloo's process group while they hold the
    interpreter's lock, and wait for gloo's threads, which may just then need that lock to release a tensor. Such a run
    hung once in some hundred, or aborted ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
