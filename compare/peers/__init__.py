"""Other trainers: the same work in each, and whether it is the same.

trainers.py has one function for each trainer, as its own documentation writes it. witness.py looks at what a process
does, same.py compares that with this trainer. Speeds are measured in bench.py, a room above.
"""
