"""Bytes of files, before they mean anything: read with a bound, checked when they are read, or from a server.

bounded reads text that others wrote, of which no line or record may be larger than a limit. remote reads ranges of
files behind URLs. checked reads and writes the files of prepared data, which have a checksum for each block. None knows
a record or a token.
"""
