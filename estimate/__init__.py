"""What a run will be and need, predicted before its first step: memory, communication, FLOPs, and the start block.

Predictions come from the model on the meta device, so they cost neither memory nor a GPU. Nothing here trains.
"""
