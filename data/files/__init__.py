"""Bytes of files, before they mean anything: read with a bound, and checked when they are read.

bounded reads text that others wrote, of which no line or record may be larger than a limit. checked reads and writes
the files of prepared data, which have a checksum for each block. Neither knows a record, a token or an option.
"""
