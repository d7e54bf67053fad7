"""Proves runtime/garbage.py: garbage is collected at set steps, and none of it is a tensor."""

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from runtime import garbage
from runtime.garbage import INTERVAL, collect_as_usual, collect_at_set_steps, leave_garbage_to_parent
from runtime.hang import stacks, watch
from tests.launch import train


def test_only_at_set_steps() -> None:
    """From the first step on, Python collects nothing by itself; at the end of the run, as before."""
    collections: list[int] = []
    steps = [0]

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop":
            collections.append(steps[-1])

    gc.callbacks.append(note)
    try:
        for step in range(INTERVAL - 5, 2 * INTERVAL + 1):
            steps.append(step)
            cycles: list[Any] = [[] for _ in range(2000)] if step > INTERVAL - 5 else []  # more than Python's threshold
            for cycle in cycles:
                cycle.append(cycle)
            collect_at_set_steps(step, first=INTERVAL - 5)
            assert not gc.isenabled()
        assert collections == [INTERVAL - 5, INTERVAL, 2 * INTERVAL]
        assert gc.get_freeze_count() > 0
    finally:
        gc.callbacks.remove(note)
        collect_as_usual()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


class Note:
    """Creates a file when it is freed."""

    def __init__(self, file: Path) -> None:
        self.file, self.itself = file, self  # so only a collection frees it

    def __del__(self) -> None:
        self.file.touch()


def fork_with_garbage(file: Path, leave: bool) -> None:
    """A process with garbage that no collection has seen, and its worker, which collects."""
    gc.disable()
    Note(file)
    if leave:
        leave_garbage_to_parent()
    worker = multiprocessing.get_context("fork").Process(target=gc.collect)
    worker.start()
    worker.join()
    os._exit(0)


@pytest.mark.parametrize("leave", [True, False])
def test_workers_leave_garbage_to_their_parent(tmp_path: Path, leave: bool) -> None:
    """A tensor of a GPU that a worker frees would end it."""
    parent = multiprocessing.get_context("spawn").Process(target=fork_with_garbage, args=(tmp_path / "freed", leave))
    parent.start()
    parent.join()
    assert parent.exitcode == 0
    assert (tmp_path / "freed").exists() != leave


@pytest.mark.parametrize("look", [stacks.place_of_main, stacks.stacks])
def test_who_looks_at_threads_holds_no_frame(look: Callable[[], object]) -> None:
    """The frames of the main thread have its tensors, and a look at them comes each second."""
    gc.collect()
    gc.disable()
    try:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        frames = [each for each in gc.garbage if type(each) is FrameType]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not frames


def keep_garbage(file: Path, leak: bool) -> None:
    """Collect after each step, and write how many objects and how many tensors that freed."""
    collect: Callable[..., int] = gc.collect
    calls = 0

    def collect_and_look(*generation: int) -> None:
        nonlocal calls
        if generation:  # torch.compile collects the young objects
            collect(*generation)
            return
        calls += 1
        gc.set_debug(gc.DEBUG_SAVEALL)
        collect()
        gc.set_debug(0)
        # type(): a weak reference whose object has gone raises when isinstance asks it.
        tensors = sum(issubclass(type(each), torch.Tensor) and each.numel() > 1 for each in gc.garbage)
        with open(file, "a") as lines:
            lines.write(f"{calls} {len(gc.garbage)} {tensors}\n")
        gc.garbage.clear()
        if leak:
            cycle: list[Any] = [torch.ones(2)]
            cycle.append(cycle)

    garbage.INTERVAL = 1
    watch.LONGEST = 0.01  # seconds from one look at the main thread to the next
    garbage.gc.collect = collect_and_look  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("world_size", "options", "leak"),
    [
        (1, [], False),
        (1, [], True),
        pytest.param(2, ["--strategy", "fsdp", "--gradient_checkpointing"], False, marks=pytest.mark.slow),
        pytest.param(2, ["--gradient_accumulation_steps", 2, "--packing", "documents"], False, marks=pytest.mark.slow),
        pytest.param(1, ["--torch_compile", "true", "--optim", "muon"], False, marks=pytest.mark.slow),
    ],
)
def test_no_tensor_waits(
    world_size: int, options: list[object], leak: bool, tiny: list[object], tmp_path: Path
) -> None:
    """A step leaves no tensor that only a collection frees. So memory does not grow between two of them."""
    file = tmp_path / "garbage"
    argv = [*tiny, "--output_dir", tmp_path / "run", "--max_steps", 4, "--eval_steps", 2, *options]
    outcome = train(world_size, argv, before=partial(keep_garbage, file, leak))
    assert outcome.exit_codes == [0] * world_size, outcome.output
    rows = [list(map(int, line.split())) for line in file.read_text().splitlines()]
    assert len(rows) >= 4 * world_size
    # The first collection is after a step that has built what later steps use.
    tensors = [count for call, _, count in rows if call > 1]
    assert (max(tensors) > 0) == leak, rows
