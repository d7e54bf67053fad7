"""A rank that is slower than the others, whom all wait for: found from times that the ranks gather at each record.

Each rank measures two times that depend on itself alone. It waits for its own data. And its decoder layers compute: no
collective of data parallelism runs within a layer, because FSDP gathers its parameters before it. On a GPU, two events
enclose a layer in the stream of the GPU, so a throttled GPU shows, and the CPU never synchronizes.
"""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from runtime import node_of_rank

BOUND = 0.25  # a lag above it, ...
RECORDS = 5  # ... in so many consecutive records, ...
SECONDS = 60.0  # ... over at least so long, is reported: a busy machine makes each rank slow for a moment
MOST = 1000  # forward passes of a layer that are timed for a record


class Stragglers:
    """The times of this rank since the last record, and how long which rank has been slow. Every rank has one."""

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.begun: Any = None  # the start of the layer's forward pass
        self.times: list[tuple[Any, Any]] = []  # start and end: seconds on a CPU, events on a GPU
        self.in_graph: list[tuple[Any, Any]] = []  # events that a CUDA graph records anew each time it runs
        self.slow_rank, self.slow_records, self.slow_seconds, self.reported = -1, 0, 0.0, False
        self.details = 0.0, 1.0  # of the slowest rank: its waits for data, and its layer's time to the median
        # A GPU computes for long, so one layer tells its speed. A CPU is interrupted now and then.
        for layer in layers[:1] if self.on_gpu else layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        if torch.is_grad_enabled() and len(self.times) < MOST:  # neither evaluation nor a long window
            self.begun = self._now()

    def _end(self, *_: object) -> None:
        if self.begun is not None:
            times = self.in_graph if self.on_gpu and torch.cuda.is_current_stream_capturing() else self.times
            times.append((self.begun, self._now()))
            self.begun = None

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        recorded = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=recorded)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def gather(self, seconds: float, data_wait: float) -> dict[str, float]:
        """The fields of a record of `seconds`, of which this rank waited `data_wait` for data. Every rank must call.

        slowest_rank is the rank with the highest lag. A lag estimates the fraction of the time in which the other
        ranks wait for this one: the fraction in which it waits for data, plus the fraction by which its layers take
        longer, each beyond the median rank. {} for one rank. The GPU must have computed all steps.
        """
        times = self.times or self.in_graph
        layer = sum(self._seconds(*pair) for pair in times) / max(1, len(times))
        self.times = []
        world_size = dist.get_world_size()
        if world_size == 1:
            return {}
        mine = torch.tensor([data_wait / seconds, layer], dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(gathered, mine)  # over gloo
        waits, layers = zip(*(times.tolist() for times in gathered), strict=True)
        # With two ranks, the faster one is the median.
        usual_wait, usual_layer = statistics.median_low(waits), statistics.median_low(layers)
        lags = [
            max(0.0, wait - usual_wait) + max(0.0, 1 - usual_layer / max(layer, 1e-9))
            for wait, layer in zip(waits, layers, strict=True)
        ]
        slowest = max(range(world_size), key=lags.__getitem__)
        self._count(slowest if lags[slowest] > BOUND else -1, seconds)
        self.details = waits[slowest], layers[slowest] / max(usual_layer, 1e-9)
        return {"slowest_rank": slowest, "slowest_rank_lag": min(lags[slowest], 1.0)}

    def _count(self, rank: int, seconds: float) -> None:
        if rank != self.slow_rank:
            self.slow_rank, self.slow_records, self.slow_seconds, self.reported = rank, 0, 0.0, False
        self.slow_records += 1
        self.slow_seconds += seconds

    def report(self) -> str:
        """A message, once, if a rank has been slow for long enough; or ""."""
        long = self.slow_records >= RECORDS and self.slow_seconds >= SECONDS
        if self.slow_rank < 0 or self.reported or not long:
            return ""
        self.reported = True
        wait, ratio = self.details
        return (
            f"rank {self.slow_rank} ({node_of_rank(self.slow_rank)}) has been slow for {self.slow_seconds:.0f} s, and "
            f"the others wait: it waits for data {wait:.0%} of the time, and its layers take {ratio:.1f} times "
            "the median\n"
            "look there for a slow disk, for other processes on its CPU cores and GPU, and for a GPU that throttles\n"
            "see docs/troubleshooting.md#slow-on-several-gpus"
        )

    def _seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self.on_gpu else end - start)
