"""Worked examples: real weights, real commands, and what they print.

A file here prepares data or weights for train.py and shows what came of them, or it shows one idea of docs/book/ on a
few numbers. It trains no model by itself, and no room imports it.
"""
