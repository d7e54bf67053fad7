"""Process start and exit: the rank and GPU of a process, the signals that it answers, its errors, hangs and exit code.

Nothing here knows what a run trains, or reads its options.
"""

import runtime.startup  # isort: skip  # noqa: F401  # before the others, because they import torch
from runtime.garbage import collect_as_usual, collect_at_set_steps
from runtime.gpus import choose_device, require_own_gpu
from runtime.hang.explain import TRAINING, WAITING_FOR_DATA
from runtime.hang.waiting import locked
from runtime.hang.watch import ACTIVITY, node_of_rank, watch_ranks
from runtime.launcher import rank_from_environment
from runtime.peers import meet
from runtime.process import at_exit, configure_libraries, run
from runtime.signals import defer_signals, ignore_signals, stop_requested

__all__ = [
    "ACTIVITY",
    "TRAINING",
    "WAITING_FOR_DATA",
    "at_exit",
    "choose_device",
    "collect_as_usual",
    "collect_at_set_steps",
    "configure_libraries",
    "defer_signals",
    "ignore_signals",
    "locked",
    "meet",
    "node_of_rank",
    "rank_from_environment",
    "require_own_gpu",
    "run",
    "stop_requested",
    "watch_ranks",
]
