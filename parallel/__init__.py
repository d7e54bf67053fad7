"""Splitting one layer over several ranks (tensor parallelism), or one sequence (context parallelism).

Both change a model in place, before `ddp.wrap` or `fsdp.wrap`. Nothing here reads options, files or the command line.
"""
