"""Process start and exit: the rank and GPU of a process, the signals that it answers, its errors and exit code.

Nothing here knows what a run trains, or reads its options.
"""

import runtime.startup  # isort: skip  # noqa: F401  # before the others, because they import torch
from runtime.gpus import choose_device, require_own_gpu
from runtime.launcher import rank_from_environment
from runtime.process import configure_libraries, run
from runtime.signals import defer_signals, ignore_signals

__all__ = [
    "choose_device",
    "configure_libraries",
    "defer_signals",
    "ignore_signals",
    "rank_from_environment",
    "require_own_gpu",
    "run",
]
