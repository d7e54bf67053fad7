"""A profiler trace of a few steps, the collectives that they had, and the time of their kernels."""

import collections
import math
from pathlib import Path
from typing import Any

import torch

from config.errors import OptionError, noting

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

# Kinds of kernels on a GPU, or of operators on a CPU, by words in their names. The first that fits decides.
KINDS = {
    "communication": ("nccl", "c10d", "gloo"),
    "attention": ("flash", "fmha", "attention", "attn"),
    "products of experts": ("grouped_mm", "grouped_gemm", "group_gemm", "groupproblemshape", "trainer::grouped"),
    "other matrix products": (
        "gemm",
        "gemv",
        "cutlass",
        "nvjet",
        "xmma",
        "cublas",
        "::mm",
        "::addmm",
        "bmm",
        "_scaled_mm",
    ),
    "optimizer": ("adam", "multi_tensor"),
    "sorting and indexing": ("sort", "topk", "histc", "cumsum", "scan", "gather", "scatter", "index", "bincount"),
    "copies": ("memcpy", "memset", "::copy_", "::_to_copy"),
}


class Trace:
    """A torch profiler that records some steps of rank 0, and reports their collectives and the time of their kernels.

    It skips the first two steps of a run, in which layers are compiled and memory is allocated. It records the
    next `steps`, each with its batch, forward, backward and update. Recording makes these steps slower.
    """

    WARMUP = 2

    def __init__(self, steps: int, output_dir: Path, failures: list[OptionError]) -> None:
        """Prepare to trace `steps` steps into `output_dir`/trace. A failure to write is added to `failures`."""
        self.steps = steps
        self.failures = failures
        self.folder = output_dir / "trace"
        self.report = ""
        self.summary: dict[str, Any] = {}  # for events.jsonl: seconds of a step by kind of kernel
        self.done = False
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=self.WARMUP, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,  # nothing is lost, and torch does not warn that it might be
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
        with noting(self.failures, path):
            self.folder.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # the profiler would follow a link
            profiler.export_chrome_trace(str(path))
            if not path.exists():  # the profiler prints an error and goes on
                raise OSError("the profiler could not write it")
        lines = [
            f"  {kind:<15}{count / self.steps:>9,g} with {size / self.steps:>17,.0f} bytes"
            for kind, (count, size) in sorted(collectives(profiler).items())
        ]
        lines += ["milliseconds of a step, by kind:"]
        times = {kind: seconds / self.steps for kind, seconds in kernel_times(profiler).items()}
        for kind, seconds in sorted(times.items(), key=lambda item: -item[1]):
            lines += [f"  {kind:<24}{1000 * seconds:>11,.2f}"]
        last = self.first + self.steps - 1
        self.summary = {"first": self.first, "last": last, "path": f"trace/{path.name}", "times": times}
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


def kernel_times(profiler: torch.profiler.profile) -> dict[str, float]:
    """The seconds of a profile by kind: of a GPU's kernels, or without a GPU of operators, each without its callees.

    Kernels of two streams may run at the same time, so the sum may exceed the time of the steps.
    """
    times: dict[str, float] = collections.defaultdict(float)
    averages = profiler.key_averages()
    kernels = [event for event in averages if event.device_type != torch.autograd.DeviceType.CPU]
    for event in kernels or averages:
        if event.key.startswith("ProfilerStep"):
            continue
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "all else")
        microseconds = event.self_device_time_total if kernels else event.self_cpu_time_total
        times[kind] += microseconds / 1e6
    return dict(times)


def _bytes(argument: Any) -> int:
    """The bytes of an operator's argument, as the profiler describes it: a tensor, a list of tensors, or other."""
    tensors = [entry for entry in (argument if isinstance(argument, list) else [argument]) if hasattr(entry, "sizes")]
    return sum(math.prod(tensor.sizes) * tensor.dtype.itemsize for tensor in tensors)
