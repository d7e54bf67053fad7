"""What the model learns from. Data moves one way through these files:

sources (find files) -> records (read them) -> conversations and tokens (detect the shape, render, tokenize) ->
packing (make sequences) -> prepare (write them once) or stream (make them while training) -> batches.

Nothing here knows a process group: rank and world size are plain integers.
"""
