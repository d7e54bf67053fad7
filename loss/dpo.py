"""Direct preference optimization: the loss of pairs.

Shapes: B sequences, T tokens of a sequence, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from loss.cross_entropy import log_probabilities
from model.adapters import adapted_modules, adapters_off


class Preference(nn.Module):
    """Direct preference optimization (Rafailov et al. 2023, equation 7): no reward model, no sampling."""

    needs_initial_model = True  # also in a resumed run: rewards are relative to it

    def __init__(self, model: PreTrainedModel, beta: float) -> None:
        super().__init__()
        self.model = model
        self.beta = beta
        self.adapters = bool(adapted_modules(model))  # without them, the model is its own reference

    def forward(
        self, input_ids: Tensor, labels: Tensor, reference: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """The sum over pairs of -log sigmoid(reward of the chosen answer - that of the rejected one): a scalar in fp32.

        `input_ids` and `labels` are int64 [B, T]: the chosen sequences of all pairs, then the rejected ones. Labels are
        the input ids, or IGNORE_INDEX where masked. `reference`, fp32 [B], holds the log-probabilities of the sequences
        by the initial model. The reward of an answer is beta x (its log-probability - the reference). If `reference` is
        empty, there are no pairs and the sum is 0. If it is None, returns the log-probabilities, fp32 [B]. With
        adapters, a forward pass without them computes the reference of the `tokens`, int64 [B or 0], first.
        """
        if self.adapters and tokens is not None:
            with torch.no_grad(), adapters_off(self.model):
                reference = self.log_probabilities(input_ids, labels)[: len(tokens)]
        log_p_B = self.log_probabilities(input_ids, labels)
        if reference is None:
            return log_p_B
        chosen, rejected = (self.beta * (log_p_B[: len(reference)] - reference)).chunk(2)
        return -functional.logsigmoid(chosen - rejected).sum()

    def log_probabilities(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The log-probability of the targets of each sequence by the model: fp32 [B]."""
        return log_probabilities(self.model(input_ids=input_ids, use_cache=False).logits, labels)
