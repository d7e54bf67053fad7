"""Measurements: this trainer against itself and against other trainers, as ratios within one run.

Every table of docs/ comes from a command here. Nothing here is imported by the trainer, and no test asserts a time.
"""
