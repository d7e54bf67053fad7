"""Planted bugs: each is a wrong line for a right one of the real code, and the test that must then fail.

`bugs.py` holds them, `plant.py` applies one to a copy of the tree, `test_museum.py` proves that its test kills it, and
`python -m tests.museum` (make museum) draws what the loss curve would have shown and writes docs/museum.md.
"""
