"""What the user asks for: options, the files that give them, their checks, and the arithmetic that follows from them.

Nothing here builds a model, reads training data or starts a process group. Every message for a user's mistake is an
OptionError that names the option, the value and the remedy.
"""
