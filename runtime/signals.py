"""The signals that a run answers: some stop it, some save a checkpoint."""

import os
import signal
import sys
import time
from types import FrameType

from runtime.parent import follow_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
FORWARDED = 1.0  # seconds: a second SIGINT within them is the first one again, forwarded by torchrun


class Signals:
    """What signals have asked of this process. The loop reads it in each step, and tells the other ranks.

    SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP) stop the run after its step. SIGUSR1 and SIGUSR2 save a
    checkpoint after the step, and the loop clears `save` then. Later signals change nothing, because a batch system
    sends SIGTERM to all processes, and torchrun forwards its own to them. Only a second Ctrl-C ends the process.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self.stopped_at = 0.0
        for number in (*STOP_SIGNALS, *SAVE_SIGNALS):
            # nohup has told this process to ignore SIGHUP.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # Another signal may interrupt this method at any call, but not between two assignments.
        if number in SAVE_SIGNALS:
            known, self.save = self.save, True
            if not known:
                _tell(number, "a checkpoint after this step, then training continues")
        elif not self.stop:
            self.stop, self.stopped_at = True, now
            _tell(number, "a checkpoint after this step, then the end; a second Ctrl-C ends the run at once")
        elif number == signal.SIGINT and now > self.stopped_at + FORWARDED:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_signals(worker: int) -> None:
    """For a worker of the data loader: a signal reaches its whole process group, but the step still needs its data.

    The worker ends with its rank.
    """
    follow_parent()
    for number in (*STOP_SIGNALS, *SAVE_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _tell(number: int, text: str) -> None:
    """Print on rank 0. The signal may have come amid a print, so this one does not use Python's buffers."""
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: {text}\n".encode())
