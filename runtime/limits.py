"""Limits of processor time and of memory, for programs and descriptions that come with a model.

A chat template is a program. jinja's sandbox keeps it from Python, from files and from long ranges. But a template may
still nest loops, call itself, or write a text that fills the memory. A config.json is no program, but it may ask for a
billion layers.
"""

import contextlib
import multiprocessing
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist


class LimitError(Exception):
    """A block reached a limit. The text names the limit."""


@contextlib.contextmanager
def limited(seconds: float, gibibytes: int) -> Iterator[None]:
    """Raise LimitError if the block takes more than `seconds` of processor time or `gibibytes` of memory.

    Costs some 25 microseconds. The time is limited only in the main thread of a process, because only that receives
    signals. The memory is limited on Linux only, and not in a rank that trains, because its other threads need memory,
    too. Blocks cannot be nested.
    """
    trains = dist.is_initialized() and multiprocessing.parent_process() is None
    try:
        with contextlib.ExitStack() as limits:
            if threading.current_thread() is threading.main_thread():
                limits.enter_context(_processor_time(seconds))
            if sys.platform == "linux" and not trains:
                limits.enter_context(_memory(gibibytes << 30))
            yield
    except MemoryError as error:
        raise LimitError(f"it needs more than {gibibytes} GiB of memory") from error


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise LimitError(f"it takes more than {seconds:g} s of processor time; it may have no end")

    before = signal.signal(signal.SIGVTALRM, stop)
    # The time of this process counts, not the time of the clock, because the machine may be busy. The signal repeats,
    # because code that catches all exceptions swallows one: jinja does where it computes constant expressions.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = [limit for limit in (soft, hard, used + more) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
