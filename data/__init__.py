"""What the model learns from: documents (corpus), conversations (chat), their tokens (encode), and rows of these.

Rows are packed (packing), prepared ahead (prepare, rows) or made while they are learned from (stream); which rank reads
which is in batches, what was read in ledger, and how a row looks in show.
Nothing here knows a process group: rank and world size are plain integers.
"""
