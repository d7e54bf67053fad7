"""The loss of next-token prediction, from logits or from hidden states in chunks, and log-probabilities.

Shapes: B sequences, T tokens of a sequence, N = B x T, C tokens of a chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import IGNORE_INDEX, next_tokens
from model.layers import compute_dtype

# The most logits in memory at a time. A GPU needs large matrix products; on a CPU, a chunk should fit in the cache.
CHUNK_LOGITS = {"cuda": 640 * 2**20, "cpu": 2**21}

InPlace = Callable[[Tensor, Tensor], Tensor]


def token_loss_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The sum of the cross entropies of all targets, in nats: a scalar in fp32.

    Sums of micro-steps and ranks are added, and divided once by the number of targets of the global batch. Means could
    not be added, because micro-batches have different numbers of targets. `labels_BT` may have one more position than
    the logits: the last token of a local sequence (context parallel) predicts the first token of the next one.
    """
    targets_BT = next_tokens(labels_BT)[:, : logits_BTV.shape[1]]
    return _cross_entropy_sum(logits_BTV.flatten(0, 1), targets_BT.flatten())


def _cross_entropy_sum(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return functional.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE_INDEX, reduction="sum")


def log_probabilities(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The log-probability of all targets of each sequence together, in nats: fp32 [B]."""
    logits_NV = logits_BTV.float().view(-1, logits_BTV.shape[-1])
    targets_BT = next_tokens(labels_BT)
    losses_N = functional.cross_entropy(logits_NV, targets_BT.view(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return -losses_N.view(targets_BT.shape).sum(dim=1)


def head_and_loss_sum(
    hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_BT: Tensor, cross_entropy_: InPlace
) -> Tensor:
    """The sum of the cross entropies of all targets, from the inputs of a linear vocabulary head: a scalar in fp32.

    All logits together would be by far the largest tensor of a step, so the head is applied to one chunk of tokens at a
    time. Gradients are computed in the forward pass while the logits of a chunk exist, and only they are saved, for a
    single backward pass. Matrix products use the dtype of torch.autocast if it is on; the rest is fp32.
    `cross_entropy_` is the function of that name below, or one that communicates when the vocabulary is split.
    """
    device, dtype = hidden_BTD.device.type, compute_dtype(weight_VD)
    targets_BT = next_tokens(labels_BT)[:, : hidden_BTD.shape[1]]
    # Masked positions must not contribute to the gradient of the weight, so their inputs are zero.
    hidden_BTD = hidden_BTD.masked_fill((targets_BT == IGNORE_INDEX).unsqueeze(-1), 0)
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    chunks = math.ceil(targets_N.numel() * len(weight_VD) / CHUNK_LOGITS[device])
    size = math.ceil(targets_N.numel() / chunks)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _HeadAndLoss.apply
            return apply(hidden_ND, weight_VD, bias_V, targets_N, dtype, size, cross_entropy_)
        weight_VD, bias_V = _cast(weight_VD, bias_V, dtype)
        losses = [
            _target_sum(cross_entropy_, functional.linear(hidden_CD.to(dtype), weight_VD, bias_V), targets_C)
            for hidden_CD, targets_C in zip(torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True)
        ]
        return torch.stack(losses).sum()


class _HeadAndLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        dtype: torch.dtype,
        size: int,
        cross_entropy_: InPlace,
    ) -> Tensor:
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32) if weight_VD.requires_grad else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None else None
        weight_VD, bias_V = _cast(weight_VD, bias_V, dtype)
        losses: list[Tensor] = []
        for hidden_CD, d_hidden_CD, targets_C in zip(
            torch.split(hidden_ND, size), torch.split(d_hidden_ND, size), torch.split(targets_N, size), strict=True
        ):
            hidden_CD = hidden_CD.to(dtype)
            d_logits_CV = functional.linear(hidden_CD, weight_VD, bias_V)
            loss = _target_sum(cross_entropy_, d_logits_CV, targets_C)
            d_hidden_CD.copy_(d_logits_CV @ weight_VD)
            if d_weight_VD is not None:
                beta = 1 if losses else 0  # the first chunk overwrites uninitialized memory
                _add_product_(d_weight_VD, d_logits_CV.T, hidden_CD, beta=beta)
            if d_bias_V is not None:
                d_bias_V += (targets_C != IGNORE_INDEX).to(dtype) @ d_logits_CV
            losses.append(loss)
            del d_logits_CV  # so that only one chunk of logits is in memory
        ctx.gradients = d_hidden_ND, d_weight_VD, d_bias_V
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD, d_bias_V = (
            None if gradient is None else gradient.mul_(d_loss) for gradient in ctx.gradients
        )
        del ctx.gradients  # changed in place, so a second backward pass must fail
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None, None


def softmax_(logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """Overwrite logits with probabilities; return the log-probabilities of `targets_C1`: fp32 [C, 1]."""
    log_p_CV = functional.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    log_p_C1 = log_p_CV.gather(1, targets_C1)
    logits_CV.copy_(log_p_CV.exp_())
    return log_p_C1


def cross_entropy_(logits_CV: Tensor, targets_C1: Tensor, softmax_: InPlace = softmax_) -> Tensor:
    """Overwrite logits with the gradients of the cross entropies; return these, in nats: fp32 [C, 1].

    `softmax_` is the function of that name above, or another implementation of it.
    """
    log_p_C1 = softmax_(logits_CV, targets_C1)
    logits_CV.scatter_(1, targets_C1, log_p_C1.expm1().to(logits_CV.dtype))  # at the target: p - 1
    return -log_p_C1


def _target_sum(cross_entropy_: InPlace, logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The sum of the cross entropies of the positions that have a target."""
    return (cross_entropy_(logits_CV, targets_C.clamp(0)[:, None])[:, 0] * (targets_C != IGNORE_INDEX)).sum()


def _cast(weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """total = beta x total + left @ right, summed in fp32 whatever the dtype of the factors."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)
