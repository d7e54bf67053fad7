"""What the model learns from: documents (corpus), rows of tokens (prepare, rows), and which rank reads which (batches).

Nothing here knows a process group: rank and world size are plain integers.
"""
