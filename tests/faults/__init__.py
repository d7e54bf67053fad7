"""Faults, each injected from outside into a run: signals, full disks, edited files, networks that break.

A test of a fault, here or in another file, has the mark `fault`: its area, the fault, and what the trainer promises.
tests/faults/promises.py collects the marks.
"""
