"""Checkpoints and the finished model: save, choose and load, and the output directory that holds them.

Every write is atomic. Tensors are safetensors and the rest is JSON: nothing here is ever unpickled. A checkpoint of one
topology loads under any other. The training loop and its numbers do not belong here.
"""
