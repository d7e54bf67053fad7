"""What the user asks for: options, the files that give them, their checks, and the arithmetic that follows from them.

Nothing here builds a model, reads training data or starts a process group. Every message for a user's mistake is an
OptionError that names the option, the value and the remedy.
"""

from config.checks import check, check_skipped
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.plan import Plan, data_parallel_rank_and_size, mesh_shape, plan_run

__all__ = [
    "OptionError",
    "Options",
    "Plan",
    "check",
    "check_skipped",
    "data_parallel_rank_and_size",
    "mesh_shape",
    "parse",
    "plan_run",
]
