"""Measurements: this trainer against itself and against other trainers, as ratios within one run.

The commands here measure what docs/ reports. Where a number was measured otherwise, its page says so. Nothing here is
imported by the trainer, and no test asserts a time.
"""
