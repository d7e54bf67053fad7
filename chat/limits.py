"""Limits of a chat template: its processor time and its memory.

A chat template is a program that comes with a model. jinja's sandbox keeps it from Python, from files and from long
ranges. But a template may still nest loops, call itself, or write a text that fills the memory.
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

SECONDS = 10.0  # of processor time for one rendering; the longest conversations take less than one

MEMORY = 1 << 30  # bytes of one rendering; a conversation of 100 million characters needs less


class TemplateLimitError(Exception):
    """A chat template reached a limit. Its text names the limit."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TemplateLimitError if the block takes more than SECONDS of processor time or MEMORY bytes.

    Costs some 25 microseconds. The time is limited only in the main thread of a process, because only that receives
    signals. The memory is limited on Linux only, and not in a rank that trains, because its other threads need memory,
    too. The first conversations have been rendered before that.
    """
    trains = dist.is_initialized() and multiprocessing.parent_process() is None
    try:
        with contextlib.ExitStack() as limits:
            if threading.current_thread() is threading.main_thread():
                limits.enter_context(_processor_time())
            if sys.platform == "linux" and not trains:
                limits.enter_context(_memory())
            yield
    except MemoryError as error:
        raise TemplateLimitError(f"it needs more than {MEMORY >> 30} GiB of memory") from error


@contextlib.contextmanager
def _processor_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TemplateLimitError(f"it takes more than {SECONDS:g} s of processor time; it may have no end")

    before = signal.signal(signal.SIGVTALRM, stop)
    # The time of this process counts, not the time of the clock, because the machine may be busy. The signal repeats,
    # because code that catches all exceptions swallows one: jinja does where it computes constant expressions.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = [limit for limit in (soft, hard, used + MEMORY) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
