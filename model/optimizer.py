"""The optimizer and the learning rate of each step."""

import json
import math
from typing import Any

import torch

from config import SCHEDULE_PARAMETERS, Options
from model.layers import matrices_of
from model.muon import Muon


def build_optimizer(model: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) as one fused kernel; only matrices decay, norms and biases do not.

    With `optim` muon, that is for the matrices of the decoder layers, the longest first, so that those which ranks
    work on at the same time are alike; all else stays AdamW's.

    Must be called after wrapping: sharding replaces the parameters. Its state follows their dtype, fp32. Its groups
    hold the parameters' names beside them, as `param_names`.
    """
    orthogonal = matrices_of(model) if options.optim == "muon" else {}
    learned = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in orthogonal
    ]
    matrices = [(name, parameter) for name, parameter in learned if parameter.dim() >= 2]
    vectors = [(name, parameter) for name, parameter in learned if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "fused": True,
    }
    if not orthogonal:
        return torch.optim.AdamW(groups, **settings)
    longest_first = sorted(orthogonal.items(), key=lambda item: -item[1].numel())
    of_muon = {"params": longest_first, "weight_decay": options.weight_decay}
    return Muon(of_muon, groups, torch.bfloat16 if options.bf16 else torch.float32, **settings)


def learning_rate(step: int, total_steps: int, options: Options) -> float:
    """The learning rate of `step`, counted from 1, of `total_steps`: the same as transformers' `get_scheduler` gives.

    It depends on the step alone, so a resumed run has nothing to restore. Linear warmup from 0; then the highest rate
    stays (constant), or falls towards 0 along a line or half a cosine (Loshchilov and Hutter 2017).
    """
    warmup = options.warmup_steps if options.warmup_steps >= 1 else options.warmup_steps * total_steps
    warmup = math.ceil(warmup)
    if options.lr_scheduler_type in SCHEDULE_PARAMETERS:
        return _rate_of_deepspeed(step, max(2, warmup), total_steps, options)
    done = step - 1
    if done < warmup:
        return options.learning_rate * done / warmup
    progress = (done - warmup) / max(1, total_steps - warmup)
    match options.lr_scheduler_type:
        case "constant":
            return options.learning_rate
        case "linear":
            return options.learning_rate * (1 - progress)
        case _:  # cosine
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _rate_of_deepspeed(step: int, warmup: int, total_steps: int, options: Options) -> float:
    """The rate that DeepSpeed's class of that name gives in its 0.19: to the digit, with its own counting.

    There, a schedule is asked after each step, and only then begins at 0: it is a step late, and the first two steps
    have the lowest rate. Its warmup rises along a logarithm unless it is told to be linear. WarmupLR then stays,
    WarmupDecayLR falls along a line to the lowest rate, WarmupCosineLR along half a cosine to a ratio of the highest.
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
