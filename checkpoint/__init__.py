"""Checkpoints and the finished model: save, choose and load, and the output directory that holds them.

Every write is atomic. Tensors are safetensors and the rest is JSON: nothing here is ever unpickled. A checkpoint of one
topology loads under any other. The training loop and its numbers do not belong here.
"""

from checkpoint.best import Selection, load_best_model
from checkpoint.export import export_model
from checkpoint.identity import Progress, identify_run, require_same_run
from checkpoint.load import choose_checkpoint, load_checkpoint
from checkpoint.output_dir import claim_output_dir, clean_output_dir
from checkpoint.rng import seed_rank
from checkpoint.save import Saver

__all__ = [
    "Progress",
    "Saver",
    "Selection",
    "choose_checkpoint",
    "claim_output_dir",
    "clean_output_dir",
    "export_model",
    "identify_run",
    "load_best_model",
    "load_checkpoint",
    "require_same_run",
    "seed_rank",
]
