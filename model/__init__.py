"""The model: building it, loading and exporting weights, attention, compilation, float8, and its decoder layers.

Nothing here depends on the number of processes, except that loading and exporting respect sharded parameters.
"""
