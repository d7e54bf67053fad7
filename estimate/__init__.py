"""What a run will be and need, predicted before its first step: memory, communication, FLOPs, and the start block.

Predictions come from the model on the meta device, so they cost neither memory nor a GPU. Nothing here trains.
"""

from estimate.flops import flops_per_token
from estimate.stages import explain_out_of_memory
from estimate.start_block import describe_run

__all__ = ["describe_run", "explain_out_of_memory", "flops_per_token"]
