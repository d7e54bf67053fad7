"""Packed documents stay apart: a sequence of several documents shows each of them itself alone.

attention.py, masks.py, recurrent.py and kernels.py change a model so. trial.py tries it out on a small model before
the run. Nothing here looks at the name of a model.
"""
