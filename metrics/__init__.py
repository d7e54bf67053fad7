"""What a run reports while it trains: the progress, metrics.jsonl, trackers, and a profiler trace. Rank 0 writes.

Nothing here computes a loss or decides what happens next.
"""

from metrics.recorder import Recorder

__all__ = ["Recorder"]
