"""Explains why ranks wait: each rank watches the others, and one names the rank that is missing.

`python -m runtime.hang OUTPUT_DIR` reads the last collectives that a run with --flight_recorder has written.
"""
