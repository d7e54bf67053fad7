"""The learning rate of each step."""

import json
import math

from config.options import SCHEDULE_PARAMETERS, Options


def learning_rate(step: int, total_steps: int, options: Options) -> float:
    """The learning rate of `step`, counted from 1, of `total_steps`. It equals that of transformers' `get_scheduler`.

    It depends on the step only, so a resumed run restores nothing. After a linear warmup from 0, the rate is constant,
    or decays to 0 linearly or along half a cosine (Loshchilov and Hutter 2017). The schedules of DeepSpeed have other
    shapes, which _deepspeed_rate describes.
    """
    warmup = options.warmup_steps if options.warmup_steps >= 1 else options.warmup_steps * total_steps
    warmup = math.ceil(warmup)
    if options.lr_scheduler_type == "constant":
        return options.learning_rate
    if options.lr_scheduler_type in SCHEDULE_PARAMETERS:
        return _deepspeed_rate(step, max(2, warmup), total_steps, options)
    done = step - 1
    if done < warmup:
        return options.learning_rate * done / warmup
    progress = (done - warmup) / max(1, total_steps - warmup)
    match options.lr_scheduler_type:
        case "constant_with_warmup":
            return options.learning_rate
        case "linear":
            return options.learning_rate * (1 - progress)
        case _:  # cosine
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _deepspeed_rate(step: int, warmup: int, total_steps: int, options: Options) -> float:
    """The rate of the schedule of this name in DeepSpeed 0.19, exactly.

    DeepSpeed updates a schedule after each step and starts it at 0, so the first two steps have the lowest rate. Warmup
    is logarithmic unless `warmup_type` is linear. WarmupLR is constant after it, WarmupDecayLR decays linearly to the
    lowest rate, and WarmupCosineLR along half a cosine to `cos_min_ratio` x the highest rate.
    """
    parameters = json.loads(options.lr_scheduler_kwargs or "{}")
    total = parameters.get("total_num_steps", total_steps)
    highest, kind, done = options.learning_rate, options.lr_scheduler_type, step - 2
    lowest = parameters.get("warmup_min_lr", 0.0)
    if kind == "WarmupCosineLR":
        lowest = parameters.get("warmup_min_ratio", 0.0) * highest
    if done < 0:
        return 0.0 if kind == "WarmupCosineLR" else lowest
    if done < warmup:
        linear = parameters.get("warmup_type") == "linear"
        risen = done / warmup if linear else math.log(done + 1) / math.log(warmup)
        return lowest + (highest - lowest) * risen
    if kind == "WarmupLR":
        return highest
    if kind == "WarmupDecayLR":
        return lowest + (highest - lowest) * max(0.0, (total - done) / max(1, total - warmup))
    progress = min(1.0, (done - warmup + 1) / max(1, total - warmup))
    least = parameters.get("cos_min_ratio", 0.0001)
    return highest * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress)))
