"""The bytes of each stage of sharding on a rank, for each parameter. docs/book/4-fsdp-and-zero.md explains them.

torchrun --nproc_per_node=4 -m examples.shards
"""

from collections.abc import Iterable
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import ddp
import fsdp

STAGES: list[tuple[str, ModuleType, bool, bool]] = [  # strategy, shard the optimizer, reshard after the forward pass
    ("DDP", ddp, False, True),
    ("ZeRO-1", ddp, True, True),
    ("ZeRO-2", fsdp, False, False),
    ("ZeRO-3", fsdp, False, True),
]


class Layers(nn.Sequential):
    """Four layers of 64 x 64 weights."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(64, 64, bias=False) for _ in range(4)))

    def tie_weights(self) -> None:
        """Does nothing, because no weight is tied."""


class Objective(nn.Module):
    """A model and its loss, as modules of loss/ are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Layers()

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.model(inputs).sum()
        return loss


def main() -> None:
    """Print a line for each stage. Every rank must call, and rank 0 prints."""
    dist.init_process_group("gloo")
    lines = [f"bytes for each parameter, on each of {dist.get_world_size()} ranks"]
    lines += [f"{'':10}{'parameters':>10}{'gradients':>11}{'moments':>9}{'sum':>6}{'gathered after the forward':>28}"]
    lines += [measure(*stage) for stage in STAGES]
    if dist.get_rank() == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


def measure(name: str, strategy: ModuleType, shard_optimizer: bool, reshard_after_forward: bool) -> str:
    """One step of a model, and the bytes that this rank holds."""
    ranks = dist.get_world_size()
    with torch.device("meta"):
        objective = Objective()  # shapes without memory
    shape = (1, ranks, 1) if strategy is fsdp else (ranks, 1, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tensor"))
    layers = list(objective.model)
    wrapped = strategy.wrap(objective, layers, mesh, torch.device("cpu"), False, reshard_after_forward, False)
    for parameter in wrapped.parameters():
        parameter.detach().fill_(0.01)  # instead of model.weights.load_weights
    optimizer = torch.optim.AdamW(wrapped.parameters())
    if shard_optimizer:
        strategy.shard_optimizer(optimizer, mesh)

    loss = wrapped(torch.ones(1, 64))
    gathered = [parameter for parameter in wrapped.parameters() if strategy is fsdp and type(parameter.data) is Tensor]
    of_gathered = held(gathered)
    loss.backward()
    gradients = held(parameter.grad for parameter in wrapped.parameters())
    optimizer.step()
    strategy.gather_parameters(optimizer)
    moments = held(moment for state in optimizer.state.values() for moment in state.values() if moment.dim())
    parameters = held(wrapped.parameters())
    total = parameters + gradients + moments
    return f"{name:10}{parameters:10}{gradients:11}{moments:9}{total:6}{of_gathered:28}"


def held(tensors: Iterable[Tensor]) -> float:
    """The bytes of this rank's shards, or of full tensors, divided by the number of parameters."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.nbytes for tensor in local) / (4 * 64 * 64)


if __name__ == "__main__":
    main()
