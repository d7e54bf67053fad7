"""What a machine has for training, and why torch cannot use a GPU of it.

Nothing here starts a process group or changes a setting. `python -m runtime.doctor` prints a report for a bug report.
"""
