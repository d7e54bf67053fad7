"""The signals that a run answers: some stop it, some save a checkpoint. Works before torch is imported."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from runtime.parent import follow_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
TELLING = 2.0  # seconds in which a rank that ends tells the others
FORWARDED = 1.0  # seconds: a second SIGINT within them is the first one again, forwarded by torchrun


class Signals:
    """What signals have asked of this process. The loop reads it in each step, and tells the other ranks.

    SIGTERM, Ctrl-C (SIGINT) and a closed terminal (SIGHUP) stop the run after its step. They end an evaluation
    (loss/evaluation.py). Before the loop there is nothing to save, so they end the process at once. SIGUSR1 and SIGUSR2
    save a checkpoint after the step, and the loop clears `save` then. Later signals change nothing, because a batch
    system sends SIGTERM to all processes, and torchrun forwards its own to them. Only a second Ctrl-C ends the process.

    A thread reads the signals. Python calls a handler only between two instructions of the main thread, which may wait
    for minutes in C++: for other ranks that have not started yet, or for a collective.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self.deferred = False  # the loop runs, so signals wait for the end of a step
        self.finishing = False  # the finished model is exported, which no signal interrupts
        self.tell_ranks: Callable[[str, int], None] | None = None  # that this one ends, and with which exit code
        self.stopped_by, self.stopped_at = signal.SIGTERM, 0.0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_pipe)
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()
        for number in (*STOP_SIGNALS, *SAVE_SIGNALS):
            # nohup has told this process to ignore SIGHUP.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _noted)

    def exit_code(self) -> int:
        """128 + the number of the signal, as a shell reports it; of SIGTERM if another rank alone had the signal."""
        return 128 + self.stopped_by

    def _read(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SAVE_SIGNALS:
                    self._ask_to_save(signal.Signals(number))
                elif number in STOP_SIGNALS:
                    self._ask_to_stop(signal.Signals(number))

    def _ask_to_save(self, number: signal.Signals) -> None:
        known, self.save = self.save, True
        if not known:
            after = "this step" if self.deferred else "the first step"
            _tell(f"{number.name}: a checkpoint after {after}, then training continues")

    def _ask_to_stop(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.deferred:
            text = f"{number.name}: ended before the first step, there is nothing to save"
            _tell(text)
            if self.tell_ranks:
                telling = threading.Thread(target=self.tell_ranks, args=(text, 128 + number), daemon=True)
                telling.start()
                telling.join(TELLING)
            os._exit(128 + number)
        if not self.stop:
            self.stopped_by, self.stopped_at, self.stop = number, now, True
            what = "the finished model is written" if self.finishing else "a checkpoint after this step"
            _tell(f"{number.name}: {what}, then the end; a second Ctrl-C ends the run at once")
        elif number == signal.SIGINT and now > self.stopped_at + FORWARDED:
            os._exit(128 + number)  # not by the signal itself, because the first process of a container ignores it


def answer_signals() -> Signals:
    """The signals of this process, answered from the first call on."""
    global _signals
    _signals = _signals or Signals()
    return _signals


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop after its step. Other ranks may not know of it."""
    return _signals is not None and _signals.stop


def defer_signals() -> Signals:
    """The signals of this process. From here on, they wait for the end of a step. Every rank must call."""
    signals = answer_signals()
    signals.deferred = True
    return signals


def ignore_signals(worker: int) -> None:
    """For a worker of the data loader: a signal reaches its whole process group, but the step still needs its data.

    The worker ends with its rank.
    """
    follow_parent()
    for number in (*STOP_SIGNALS, *SAVE_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


_signals: Signals | None = None


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread of Signals acts. A signal needs a handler in Python, or it would not be written to the pipe."""


def _leave_pipe() -> None:
    """After a fork: a signal to the child is not one to its parent."""
    signal.set_wakeup_fd(-1)


def _tell(text: str) -> None:
    """Print on rank 0. The main thread may be amid a print, so this one does not use Python's buffers."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with contextlib.suppress(OSError):  # its reader may have gone
            os.write(2, f"{text}\n".encode())
