"""The drawings of the book: one picture in a function, with positions that are computed from what the code does.

svg.py has the elements of a picture, steps.py the timelines of recorded steps, and pictures.py all others. Only `make
drawings` writes docs/book/drawings/.
"""
