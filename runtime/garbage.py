"""Python's garbage collection, at the same steps on all ranks."""

import gc
from collections.abc import Iterable, Iterator

INTERVAL = 50  # steps


def collect_at_set_steps(steps: Iterable[int]) -> Iterator[int]:
    """Yield `steps`, and collect garbage only before the first and after each INTERVAL-th. Every rank must call.

    Python would collect when it has allocated many objects, which each rank does at another moment, and in each step
    all ranks wait for the slowest. A collection of all objects takes tenths of a second. Objects that exist before the
    loop are frozen: no collection looks at them, so it is short. Memory is freed by reference counts, as before; only
    objects that refer to each other wait, and no tensor is among them.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for step in steps:
            yield step
            if step % INTERVAL == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
