"""The data that a run trains on. It moves one way through these files:

sources (find files) -> records (read them) -> tokens (detect the shape, render with chat/, tokenize) -> packing
(make sequences) -> cache (write them once) or stream (make them during training) -> batches. prepare calls them in this
order. It alone, with sources, sees the options of a run: each stage gets small values of its own. files/ reads and
writes their bytes, with a bound and with checksums.

No file here knows a process group: rank and world size are plain integers.
"""
