"""Splitting one layer over several ranks (tensor parallelism), or one sequence (context parallelism).

Both change a model in place before ddp or fsdp wraps it. Nothing here reads options, files or the command line.
"""
