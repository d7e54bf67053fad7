"""The learning rate of each step."""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import get_scheduler

from config.options import DEEPSPEED_SCHEDULES, Options
from config.schedule import schedule_parameters, warmup_of


def learning_rate(step: int, total_steps: int, options: Options) -> float:
    """The learning rate of `step`, counted from 1, of `total_steps`.

    It depends on the step only, so a resumed run restores nothing. The schedules are those of transformers'
    `get_scheduler`, and three of DeepSpeed, which _deepspeed_rate describes.
    """
    kind, warmup, parameters = options.lr_scheduler_type, warmup_of(options, total_steps), schedule_parameters(options)
    if kind in DEEPSPEED_SCHEDULES:
        return _deepspeed_rate(step, max(2, warmup), total_steps, options.learning_rate, kind, parameters)
    factor = _transformers_factor(kind, options.learning_rate, warmup, total_steps, json.dumps(parameters))
    return options.learning_rate * factor(step - 1)


@cache
def _transformers_factor(
    kind: str, highest: float, warmup: int, total_steps: int, parameters: str
) -> Callable[[int], float]:
    """The function of transformers from the steps done to the rate, as a fraction of the `highest` rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=highest)  # get_scheduler reads its rate
    given = json.loads(parameters)
    steps = None if "num_stable_steps" in given else total_steps
    return get_scheduler(kind, optimizer, warmup, steps, given).lr_lambdas[0]


def _deepspeed_rate(
    step: int, warmup: int, total_steps: int, highest: float, kind: str, parameters: dict[str, Any]
) -> float:
    """The rate of the schedule of this name in DeepSpeed 0.19, exactly.

    DeepSpeed updates a schedule after each step and starts it at 0, so the first two steps have the lowest rate. Warmup
    is logarithmic unless `warmup_type` is linear. WarmupLR is constant after it, WarmupDecayLR decays linearly to the
    lowest rate, and WarmupCosineLR along half a cosine to `cos_min_ratio` x the highest rate.
    """
    total, done = parameters.get("total_num_steps", total_steps), step - 2
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
