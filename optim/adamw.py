"""The optimizer and the learning rate of each step."""

from typing import Any

import torch

from config.options import Options
from model.layers import decoder_matrices
from optim.muon import Muon


def build_optimizer(model: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) as one fused kernel; only matrices decay, norms and biases do not.

    With `optim` muon, that is for the matrices of the decoder layers, the longest first, so that those which ranks
    work on at the same time are alike; all else stays AdamW's.

    Must be called after wrapping: sharding replaces the parameters. Its state follows their dtype, fp32. Its groups
    hold the parameters' names beside them, as `param_names`.
    """
    orthogonal = decoder_matrices(model) if options.optim == "muon" else {}
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
