"""What is trained: building the model, its weights in and out, attention, compilation, float8, and its decoder layers.

Nothing here knows how many processes there are, except that loading and exporting respect sharded parameters.
"""
