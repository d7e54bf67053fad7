"""What garbage collection costs: steps with Python's own collections, and with collections at set steps.

    torchrun --nproc_per_node=4 -m compare.garbage [options of train.py]

Trains once. Blocks of 50 steps take turns: in one, Python collects when it has allocated many objects, as in a loop
without runtime/garbage.py; in the next, no rank collects until the end of the block. Prints the times of a step in
both, relative to the median of the second, and the seconds of the collections on each rank.
"""

import gc
import runpy
import statistics
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import metrics.recorder
from runtime.garbage import INTERVAL

PYTHONS, OURS = "Python's own", "set steps"


class Meter:
    """The times of steps and of collections, for each way."""

    def __init__(self) -> None:
        self.way, self.began, self.since = PYTHONS, 0.0, 0.0
        self.steps: dict[str, list[float]] = {PYTHONS: [], OURS: []}
        self.collections: dict[str, list[float]] = {PYTHONS: [], OURS: []}
        gc.callbacks.append(self._collection)

    def _collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self.began = time.perf_counter()
        else:
            self.collections[self.way].append(time.perf_counter() - self.began)

    def step(self, step: int, first: int) -> None:
        """In place of collect_at_set_steps: both ways take turns. Their first blocks, which warm up, do not count."""
        now, block = time.perf_counter(), (step - first) // INTERVAL
        if step == first:
            gc.collect()
        last = (step - first) % INTERVAL == INTERVAL - 1
        if self.way == OURS and last:
            gc.collect()
            now = time.perf_counter()
        if step != first:
            self.steps[self.way].append(now - self.since)
        if last and block < 2:
            self.steps[self.way], self.collections[self.way] = [], []
        if last:
            gc.enable()
            gc.unfreeze()
            self.way = (PYTHONS, OURS)[(block + 1) % 2]
            if self.way == OURS:
                gc.freeze()
                gc.disable()
        self.since = time.perf_counter()

    def report(self) -> None:
        """Print the comparison, on rank 0."""
        mine = {way: (sum(times), max(times, default=0.0)) for way, times in self.collections.items()}
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
        if dist.get_rank():
            return
        usual = statistics.median(self.steps[OURS])
        for way, times in self.steps.items():
            cuts = statistics.quantiles(times, n=100)
            shown = ", ".join(
                f"{name} {value / usual:.3f}"
                for name, value in zip(("median", "90%", "99%"), (cuts[49], cuts[89], cuts[98]), strict=True)
            )
            ranks = "; ".join(f"{of[way][0] / sum(times):.2%}, longest {of[way][1] / usual:.2f}" for of in of_ranks)
            print(
                f"{way:>13}: {len(times)} steps, mean {statistics.mean(times) / usual:.3f}, {shown}; "
                f"collections of each rank, of the time, and the longest in steps: {ranks}",
                flush=True,
            )


if __name__ == "__main__":
    meter = Meter()
    metrics.recorder.collect_at_set_steps = meter.step
    metrics.recorder.collect_as_usual = meter.report
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"), run_name="__main__")
