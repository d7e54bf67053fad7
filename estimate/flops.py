"""The floating-point operations of a training step."""

import torch
from transformers import PreTrainedModel

from parallel.checks import attention_heads


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float | None:
    """Floating-point operations of one forward and backward pass, per token; None for layers it cannot count.

    6 per weight that a token is multiplied with (2 forward, 4 backward; Kaplan et al. 2020, section 2.1), and for
    attention 6 x layers x query heads x head_dim x sequence length: half of the full square, because it is causal.
    Recomputation by activation checkpointing is not counted, so that MFU means useful work. A model with mixtures of
    experts or other layers that are not torch.nn.Linear gives None.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    embedding = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    counted = {id(weight) for weight in [*linear, *embedding]}
    if any(parameter.dim() > 1 and id(parameter) not in counted for parameter in model.parameters()):
        return None
    heads = attention_heads(model.config)
    attention = model.config.get_text_config().num_hidden_layers * heads.queries * heads.head_dim * sequence_length
    return 6.0 * sum(weight.numel() for weight in linear) + 6.0 * attention
