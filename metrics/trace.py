"""A profiler trace of a few steps, and the collectives that they had."""

import collections
import math
from pathlib import Path
from typing import Any

import torch

from config.errors import writing

COLLECTIVES = {
    "c10d::allreduce_": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
}


class Trace:
    """A torch profiler that records some steps of rank 0, and reports their collectives.

    It skips the first two steps of a run, in which layers are compiled and DDP finds the order of its buckets. It
    records the next `steps`, each with its batch, forward, backward and update. Recording makes these steps slower.
    """

    WARMUP = 2

    def __init__(self, steps: int, output_dir: Path) -> None:
        self.steps = steps
        self.folder = output_dir / "trace"
        self.report = ""
        self.done = False
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=self.WARMUP, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def start(self, step: int) -> None:
        """Begin after `step` steps."""
        self.first = step + self.WARMUP + 1
        self.profiler.start()

    def step(self) -> str:
        """Call after each step. Returns the report after the last recorded step, and "" otherwise."""
        self.profiler.step()
        report, self.report = self.report, ""
        return report

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.done = True
        path = self.folder / f"steps-{self.first}-{self.first + self.steps - 1}.json"
        with writing(path):
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
            if not path.exists():  # the profiler prints an error and goes on
                raise OSError("the profiler could not write it")
        lines = [
            f"  {kind:<15}{count / self.steps:>9,g} with {size / self.steps:>17,.0f} bytes"
            for kind, (count, size) in sorted(collectives(profiler).items())
        ]
        self.report = "\n".join([f"traced {path}; collectives of a step:", *lines])


def collectives(profiler: torch.profiler.profile) -> dict[str, tuple[int, int]]:
    """The number of collectives of each kind in a profile, and the bytes of their full tensors.

    The names are those of torch's operators, for DDP (which calls them from C++), FSDP and the loop. The full tensor is
    the larger argument: the result of an all-gather, the input of a reduce-scatter.
    """
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    assert profiler.profiler
    results: Any = profiler.profiler.kineto_results
    waiting = list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name not in COLLECTIVES:
            continue
        kind = COLLECTIVES[event.name]
        calls, size = found[kind]
        found[kind] = (calls + 1, size + max(map(_bytes, event.extra_fields.inputs)))
    return found


def _bytes(argument: Any) -> int:
    """The bytes of an operator's argument, as the profiler describes it: a tensor, a list of tensors, or other."""
    tensors = [entry for entry in (argument if isinstance(argument, list) else [argument]) if hasattr(entry, "sizes")]
    return sum(math.prod(tensor.sizes) * tensor.dtype.itemsize for tensor in tensors)
