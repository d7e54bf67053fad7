"""CUDA graphs: the CPU launches all kernels of a micro-step at once, instead of one by one.

The forward and backward pass of a small model runs thousands of short kernels. If the CPU takes longer to launch them
than the GPU to run them, the GPU is idle between them. A CUDA graph holds the kernels of a micro-step with all their
addresses, those of collectives too, and one call launches them again. They are the kernels of the plain path, in the
same order, so the numbers are the same to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import import_utils

from config.errors import OptionError, first_line
from config.options import Options
from data.batches import Batch
from model.layers import expert_stacks, random_noise
from runtime import ACTIVITY

WARMUP_STEPS = 3  # on the plain path: layers are compiled, and FSDP and cuBLAS allocate what they keep

ForwardBackward = Callable[[Batch, float], Tensor]


def obstacle(options: Options, packing: str, objective: nn.Module) -> str:
    """Why the micro-steps of a run are not launched as CUDA graphs; "" if they are.

    A graph repeats the same kernels on the same addresses, so shapes must not change, and the CPU must not decide
    anything within a micro-step. A collective that DDP launches from Python's hooks is not recorded.
    """
    model: Any = objective.model
    several = dist.get_world_size() > 1
    reasons = {
        "there is no GPU": not torch.cuda.is_available(),
        "cuda_graphs is false": options.cuda_graphs == "false",
        "gloo communicates on the CPU": options.ddp_backend == "gloo",
        "torch_compile is false": not options.torch_compile,
        "trace_steps shows the collectives of plain steps": options.trace_steps > 0,
        "DDP needs a single rank; fsdp does not": several and options.strategy == "ddp",
        f"with packing {packing}, the shapes of batches change": packing != "concat" or options.streaming,
        "offloading needs the CPU": options.cpu_offload or options.offload_activations,
        "experts get different numbers of tokens": bool(expert_stacks(model)),
        "dropout is drawn anew in each step": random_noise(model),
        f"{type(model).__name__} computes after its head, or on the CPU": not getattr(
            objective, "ends_with_head", False
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def with_cuda_graphs(
    forward_backward: ForwardBackward,
    wrapped: nn.Module,
    objective: nn.Module,
    options: Options,
    packing: str,
    micro_steps: int,
) -> ForwardBackward:
    """`forward_backward`, or its CUDA graphs from the fourth step on. It must be called `micro_steps` times a step.

    `forward_backward` takes a micro-batch on the GPU and the factor of its loss, adds to the gradients of `wrapped`,
    and returns the loss. Raises OptionError if `cuda_graphs` is true and there is an obstacle.
    """
    reason = obstacle(options, packing, objective)
    if reason and options.cuda_graphs == "true":
        raise OptionError(f"cuda_graphs true: not possible here, because {reason}\nremove --cuda_graphs")
    return forward_backward if reason else Replayed(forward_backward, wrapped, micro_steps)


class Replayed:
    """`forward_backward` as CUDA graphs: one for each kind of micro-step, recorded when it first occurs.

    The first micro-step of a step writes gradients, the others add to them, and the last one communicates them. So
    there are up to three kinds. They share one pool of memory, because they run in the order in which they were
    recorded. The pool keeps the memory of one micro-step until the end of the run.
    """

    def __init__(self, forward_backward: ForwardBackward, wrapped: nn.Module, micro_steps: int) -> None:
        self.forward_backward, self.wrapped, self.micro_steps = forward_backward, wrapped, micro_steps
        self.calls = 0
        self.graphs: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.inputs: Batch = {}  # the memory that the graphs read
        self.gradients: list[tuple[nn.Parameter, Tensor | None]] = []  # the memory that they write

    def __call__(self, batch: Batch, scale: float) -> Tensor:
        """Add the gradients of `scale` x the loss of `batch`, and return the loss. Every rank must call."""
        position = self.calls % self.micro_steps
        self.calls += 1
        if self.calls <= WARMUP_STEPS * self.micro_steps:
            return self.forward_backward(batch, scale)
        if not self.inputs:
            self.inputs = {name: tensor.clone() for name, tensor in batch.items()}
            self.scale = torch.zeros((), device=next(iter(batch.values())).device)
            self.pool = torch.cuda.graph_pool_handle()
        kind = position == 0, position == self.micro_steps - 1
        if kind not in self.graphs:
            self.graphs[kind] = self.record()
        for name, tensor in batch.items():
            assert tensor.shape == self.inputs[name].shape, f"{name} has another shape"
            self.inputs[name].copy_(tensor)
        self.scale.fill_(scale)
        ACTIVITY.micro_step = position + 1  # for the report of a hang; on the plain path, a hook of the model counts
        graph, loss = self.graphs[kind]
        graph.replay()
        if position == self.micro_steps - 1:  # zero_grad has removed the gradients, but the graph writes them again
            for parameter, gradient in self.gradients:
                parameter.grad = gradient
        return loss.clone()

    def record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of the next micro-step, and where it will write the loss. Nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        capturing, import_utils.is_cuda_stream_capturing = import_utils.is_cuda_stream_capturing, lambda: False
        try:  # transformers would otherwise build a mask, and choose other kernels than on the plain path
            # thread_local: the loader's thread may allocate page-locked memory meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                loss = self.forward_backward(self.inputs, self.scale)  # type: ignore[arg-type]  # a number in memory
        except RuntimeError as error:
            raise OptionError(
                f"cuda_graphs: a micro-step cannot be recorded: {first_line(error)}\npass --cuda_graphs false"
            ) from error
        finally:
            import_utils.is_cuda_stream_capturing = capturing
        self.gradients = [(parameter, parameter.grad) for parameter in self.wrapped.parameters()]
        return graph, loss
