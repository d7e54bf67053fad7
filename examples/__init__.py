"""Worked examples: real weights, real commands, and what they print.

A file here prepares data or weights for train.py and shows what came of them. It trains nothing by itself, and no room
imports it.
"""
