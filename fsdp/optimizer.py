"""The optimizer under sharding (ZeRO stages 2 and 3): its parameters and its state are already shards."""

from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer


def shard_optimizer(optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Does nothing, because the parameters of the optimizer are this rank's shards (ZeRO stages 2 and 3)."""


def gather_parameters(optimizer: Optimizer) -> None:
    """Does nothing, because the next forward pass all-gathers the parameters of each unit."""
