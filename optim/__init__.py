"""Optimizers: AdamW, Muon, and the learning rate of each step.

Nothing here depends on how the model is replicated or sharded, except that Muon gathers the shards of a matrix.
"""

from optim.adamw import build_optimizer
from optim.schedule import learning_rate

__all__ = ["build_optimizer", "learning_rate"]
