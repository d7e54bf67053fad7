"""The objective that a step minimizes: next-token prediction or direct preference optimization.

Each objective is a module that holds the model, and whose forward returns the sum of the losses of a micro-batch. The
division by the number of targets belongs to train.py. Nothing here updates a parameter.
"""
