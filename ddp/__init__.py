"""Replication: every rank holds the whole model. The twin of `fsdp`, with the same functions.

Plain functions over raw torch calls: no options, no files, no loop.
"""

from ddp.gradients import clip_grad_norm, set_gradient_sync
from ddp.wrap import wrap

__all__ = ["clip_grad_norm", "set_gradient_sync", "wrap"]
