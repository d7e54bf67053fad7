"""The loss of next-token prediction, and the log-probabilities of sequences.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

IGNORED = -100
"""The label of a position that is no target: padding, or text that is given and not learned."""


def token_loss_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The sum, not the mean, of the cross entropies of all targets, in nats: a scalar in fp32.

    A sum can be added over micro-steps and ranks and divided once by the number of targets of the whole global batch;
    a mean cannot, where micro-batches hold different numbers of targets.
    """
    targets_BT = next_tokens(labels_BT)
    logits_NV = logits_BTV.float().view(-1, logits_BTV.shape[-1])
    return functional.cross_entropy(logits_NV, targets_BT.view(-1), ignore_index=IGNORED, reduction="sum")


def log_probabilities(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Of each row, the log-probability of all its targets together, in nats: fp32 [B]."""
    logits_NV = logits_BTV.float().view(-1, logits_BTV.shape[-1])
    targets_BT = next_tokens(labels_BT)
    losses_N = functional.cross_entropy(logits_NV, targets_BT.view(-1), ignore_index=IGNORED, reduction="none")
    return -losses_N.view(targets_BT.shape).sum(dim=1)


def next_tokens(labels_BT: Tensor) -> Tensor:
    """What position t has to predict: label t + 1; nothing at the last position of a row."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float | None:
    """Floating-point operations of one forward and backward pass, per token; None for layers it cannot count.

    6 per weight that a token is multiplied with (2 forward, 4 backward; Kaplan et al. 2020, section 2.1), and for
    attention 6 x layers x query width x length: half of the full square, because it is causal. Recomputation by
    activation checkpointing is not counted, so that MFU means useful work. Mixtures of experts and other layers that
    are not torch.nn.Linear are not known here.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    embedding = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    counted = {id(weight) for weight in [*linear, *embedding]}
    if any(parameter.dim() > 1 and id(parameter) not in counted for parameter in model.parameters()):
        return None
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * sequence_length
    return 6.0 * sum(weight.numel() for weight in linear) + 6.0 * attention
