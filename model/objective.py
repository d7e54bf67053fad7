"""What a step minimises: a module that holds the model, and whose forward gives the sum of the losses of a micro-batch.

Model and loss are one module because they are wrapped as one: the vocabulary head belongs to both, and its parameters
are there, whole, only inside of the wrapped forward.
Shapes: B rows of a micro-batch, T tokens of a row, V vocabulary.
"""

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from model.loss import log_probabilities, token_loss_sum


class NextToken(nn.Module):
    """Next-token prediction."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        document_ends: Tensor | None = None,
    ) -> Tensor:
        """The sum of the cross entropies of all targets: a scalar in fp32. `input_ids` and `labels` are int64 [B, T].

        Labels are the input ids, or IGNORED: the loss shifts them by one. data/batches.py says what keeps the documents
        of a row apart; without it, a row is one document.
        """
        logits_BTV = self.model(
            input_ids=input_ids, position_ids=position_ids, document_ends=document_ends, use_cache=False
        ).logits
        return token_loss_sum(logits_BTV, labels)


class Preference(nn.Module):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): no reward model, no sampling."""

    def __init__(self, model: PreTrainedModel, beta: float) -> None:
        super().__init__()
        self.model = model
        self.beta = beta

    def forward(self, input_ids: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        """The sum over pairs of -log sigmoid(reward of the chosen answer - that of the rejected one): a scalar in fp32.

        `input_ids` and `labels` are as above, the chosen sequences of all pairs before the rejected ones. `reference`,
        fp32, has for each of them its log-probability by a model that stays as it is; a reward is beta times how much
        higher this model's is. Without `reference`, the log-probabilities themselves, fp32 [B]: how one is made.

        Without any pair, `reference` is empty, and what stands in `input_ids` counts for nothing.
        """
        logits_BTV = self.model(input_ids=input_ids, use_cache=False).logits
        learned_B = log_probabilities(logits_BTV, labels)
        if reference is None:
            return learned_B
        chosen, rejected = (self.beta * (learned_B[: len(reference)] - reference)).chunk(2)
        return -functional.logsigmoid(chosen - rejected).sum()
