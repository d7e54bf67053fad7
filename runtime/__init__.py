"""Process start and exit: the rank and GPU of a process, the signals that it answers, its errors, hangs and exit code.

Nothing here knows what a run trains, or reads its options.
"""

from runtime.explain import TRAINING, WAITING_FOR_DATA
from runtime.gpus import choose_device, require_own_gpu
from runtime.launcher import rank_from_environment
from runtime.parent import follow_parent
from runtime.peers import meet
from runtime.process import configure_libraries, run
from runtime.signals import Signals, ignore_signals
from runtime.watch import ACTIVITY, node_of_rank, watch_ranks

__all__ = [
    "ACTIVITY",
    "TRAINING",
    "WAITING_FOR_DATA",
    "Signals",
    "choose_device",
    "configure_libraries",
    "follow_parent",
    "ignore_signals",
    "meet",
    "node_of_rank",
    "rank_from_environment",
    "require_own_gpu",
    "run",
    "watch_ranks",
]
