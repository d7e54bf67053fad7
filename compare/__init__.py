"""Measurements: this trainer against itself and against others, as ratios within one run. Nothing here is imported."""
