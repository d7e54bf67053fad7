"""The optimizer and the learning rate of each step."""

import math

import torch

from config import Options


def build_optimizer(model: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) as one fused kernel; only matrices decay, norms and biases do not.

    Must be called after wrapping: sharding replaces the parameters. Its state follows their dtype, fp32. Its groups
    hold the parameters' names beside them, as `param_names`.
    """
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in learned if parameter.dim() >= 2]
    vectors = [(name, parameter) for name, parameter in learned if parameter.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, options: Options) -> float:
    """The learning rate of `step`, counted from 1, of `total_steps`: the same as transformers' `get_scheduler` gives.

    It depends on the step alone, so a resumed run has nothing to restore. Linear warmup from 0; then the highest rate
    stays (constant), or falls towards 0 along a line or half a cosine (Loshchilov and Hutter 2017).
    """
    done = step - 1
    warmup = options.warmup_steps if options.warmup_steps >= 1 else options.warmup_steps * total_steps
    warmup = math.ceil(warmup)
    if done < warmup:
        return options.learning_rate * done / warmup
    progress = (done - warmup) / max(1, total_steps - warmup)
    match options.lr_scheduler_type:
        case "constant":
            return options.learning_rate
        case "linear":
            return options.learning_rate * (1 - progress)
        case "cosine":
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
