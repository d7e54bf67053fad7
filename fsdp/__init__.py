"""Sharding: every rank holds a shard of each parameter. Counterpart of `ddp`, with the same functions.

Plain functions over raw torch calls: no options, no files, no loop.
"""

from fsdp.gradients import grad_norm, set_gradient_sync
from fsdp.optimizer import gather_parameters, shard_optimizer
from fsdp.wrap import wrap

__all__ = ["gather_parameters", "grad_norm", "set_gradient_sync", "shard_optimizer", "wrap"]
