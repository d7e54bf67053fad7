"""Python's garbage collection, at the same steps on all ranks."""

import gc
import os

INTERVAL = 50  # steps


def collect_at_set_steps(step: int, first: int) -> None:
    """Collect garbage after `step` if it is due: after the `first` step of this process, and each INTERVAL-th.

    Every rank must call, after each step. Python would collect when it has allocated many objects, which each rank does
    at another moment, and in each step all ranks wait for the slowest. A collection of all objects takes tenths of a
    second. Those that exist after the first step are frozen: no collection looks at them, so it is short. Memory is
    freed by reference counts, as before; only objects that refer to each other wait. The only tensors among them are
    scalars.
    """
    if step == first:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif step % INTERVAL == 0:
        gc.collect()


def collect_as_usual() -> None:
    """Let Python decide again when to collect."""
    gc.enable()
    gc.unfreeze()


def leave_garbage_to_parent() -> None:
    """Let no process that is forked from this one, such as a worker of the data loader, collect what exists now.

    That may be a tensor of a GPU. CUDA ends a forked process that frees one.
    """
    os.register_at_fork(after_in_child=gc.freeze)
