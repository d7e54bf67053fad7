"""The learning rate schedule in the options: its warmup and parameters, checked against its rates and steps."""

import json
import math
from typing import Any

from config.errors import OptionError
from config.options import DEEPSPEED_SCHEDULES, TRANSFORMERS_SCHEDULES, Options
from config.text import load_json

# The parameters that are words or numbers of steps. All others are numbers from 0.
WORDS = dict.fromkeys(DEEPSPEED_SCHEDULES, ("log", "linear")) | {"warmup_stable_decay": ("linear", "cosine", "1-sqrt")}
STEPS = ("num_decay_steps", "num_stable_steps", "total_num_steps")

# The parameter that min_lr sets, in the schedules that have one. min_lr_ratio is a fraction of learning_rate.
LOWEST = {
    "cosine_with_min_lr": "min_lr",
    "cosine_warmup_with_min_lr": "min_lr",
    "polynomial": "lr_end",
    "warmup_stable_decay": "min_lr_ratio",
}


def warmup_of(options: Options, total_steps: int) -> int:
    """The steps of the warmup. As in transformers, `warmup_steps` below 1 is a fraction of all steps, rounded up."""
    return int(options.warmup_steps) if options.warmup_steps >= 1 else math.ceil(options.warmup_steps * total_steps)


def schedule_parameters(options: Options) -> dict[str, Any]:
    """`lr_scheduler_kwargs` without those that are null, and `min_lr` by the name that the schedule has for it.

    Raises OptionError if they are no JSON mapping, or set the lowest learning rate twice.
    """
    kind, text = options.lr_scheduler_type, options.lr_scheduler_kwargs or "{}"
    try:
        parameters = {name: value for name, value in load_json(text).items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise OptionError(f"lr_scheduler_kwargs {text}: {_takes(kind)}") from error
    if options.min_lr is None:
        return parameters
    if kind not in LOWEST:
        instead = {"linear": "polynomial", "cosine": "cosine_with_min_lr"}.get(kind, f"one of {', '.join(LOWEST)}")
        raise OptionError(
            f"min_lr {options.min_lr:g}: --lr_scheduler_type {kind} has no lowest learning rate\n"
            f"pass --lr_scheduler_type {instead}, or remove --min_lr"
        )
    if twice := {LOWEST[kind], "min_lr_rate"} & parameters.keys():
        raise OptionError(f"min_lr {options.min_lr:g}: {twice.pop()} of lr_scheduler_kwargs sets it, too; remove one")
    if not 0 <= options.min_lr <= options.learning_rate:
        raise OptionError(f"min_lr {options.min_lr:g}: pass 0 to learning_rate, {options.learning_rate:g}")
    ratio = options.min_lr / options.learning_rate if options.learning_rate else 0.0
    return parameters | {LOWEST[kind]: ratio if kind == "warmup_stable_decay" else options.min_lr}


def check_schedule(options: Options) -> None:
    """Refuse a schedule whose parameters do not define it. `learning_rate` must be scaled. Raises OptionError."""
    kind, text = options.lr_scheduler_type, options.lr_scheduler_kwargs
    if kind == "constant" and options.warmup_steps:
        raise OptionError(
            f"warmup_steps {options.warmup_steps:g}: --lr_scheduler_type constant has no warmup\n"
            "pass --lr_scheduler_type constant_with_warmup, or remove --warmup_steps"
        )
    parameters = schedule_parameters(options)
    if unknown := [name for name in parameters if name not in _known(kind)]:
        raise OptionError(f"lr_scheduler_kwargs {text}: {', '.join(unknown)}: unknown\n{_takes(kind)}")
    for name, value in parameters.items():
        if wrong := _wrong(kind, name, value):
            raise OptionError(f"lr_scheduler_kwargs {text}: {name} {value}: {wrong}")
    if kind == "warmup_stable_decay" and "num_decay_steps" not in parameters:
        example = json.dumps(parameters | {"num_decay_steps": 200})
        raise OptionError(
            "lr_scheduler_type warmup_stable_decay: the number of steps of its decay is not given\n"
            f"pass it, as in --lr_scheduler_kwargs '{example}'"
        )
    if "min_lr" in _known(kind) and ("min_lr" in parameters) == ("min_lr_rate" in parameters):
        raise OptionError(
            f"lr_scheduler_type {kind}: it needs one lowest learning rate\n"
            "pass --min_lr, or min_lr_rate in --lr_scheduler_kwargs as a fraction of learning_rate"
        )
    lowest = parameters.get("lr_end", 1e-7) if kind == "polynomial" else parameters.get("min_lr", -1.0)
    if lowest >= options.learning_rate:
        raise OptionError(
            f"learning_rate {options.learning_rate:g}: --lr_scheduler_type {kind} ends at {lowest:g}\n"
            "pass a higher --learning_rate, or a lower --min_lr"
        )


def check_schedule_steps(options: Options, total_steps: int) -> None:
    """Refuse phases that do not fit into the steps of the run, or leave steps without a rate. Raises OptionError."""
    if options.lr_scheduler_type != "warmup_stable_decay":
        return
    parameters, warmup = schedule_parameters(options), warmup_of(options, total_steps)
    decay, stable = parameters["num_decay_steps"], parameters.get("num_stable_steps")
    phases = f"lr_scheduler_type warmup_stable_decay: warmup {warmup} + decay {decay}"
    if stable is None and warmup + decay > total_steps:
        raise OptionError(f"{phases} steps are more than the {total_steps} of the run\npass fewer, or more --max_steps")
    rest = total_steps - warmup - decay - (stable or 0)
    if stable is not None and rest > 0 and not parameters.get("min_lr_ratio"):
        raise OptionError(
            f"{phases} + stable {stable} steps leave {rest} of {total_steps} with a learning rate of 0\n"
            "remove num_stable_steps, which then has all steps between, or pass --min_lr"
        )


def _known(kind: str) -> tuple[str, ...]:
    return (TRANSFORMERS_SCHEDULES | DEEPSPEED_SCHEDULES)[kind]


def _takes(kind: str) -> str:
    if not _known(kind):
        return f"--lr_scheduler_type {kind} takes none; remove --lr_scheduler_kwargs"
    return f"--lr_scheduler_type {kind} takes a JSON mapping of {', '.join(_known(kind))}"


def _wrong(kind: str, name: str, value: Any) -> str:
    """The remedy for a value that the parameter cannot have, or ""."""
    if name.endswith("_type"):
        return "" if value in WORDS[kind] else f"pass {', '.join(WORDS[kind])}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return "pass a number from 0"
    if name in STEPS and value != int(value):
        return "pass a whole number of steps"
    if name in ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate") and value > 1:
        return "pass a fraction of learning_rate, from 0 to 1"
    if name == "timescale" and value == 0:
        return "pass a number of steps above 0"
    return ""
