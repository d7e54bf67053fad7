"""Replication: every rank holds the full model. Counterpart of `fsdp`, with the same functions.

Plain functions over raw torch calls: no options, no files, no loop.
"""

from ddp.gradients import grad_norm, set_gradient_sync
from ddp.optimizer import gather_parameters, shard_optimizer
from ddp.wrap import wrap

__all__ = ["gather_parameters", "grad_norm", "set_gradient_sync", "shard_optimizer", "wrap"]
