"""The optimizer under sharding: its parameters are this rank's shards already, and so is its state."""

from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer


def shard_optimizer(optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Nothing to do: the optimizer was built over shards (ZeRO stages 2 and 3)."""


def gather_parameters(optimizer: Optimizer) -> None:
    """Nothing to do: each unit's forward gathers what it needs."""
