"""What a step minimises: a module that holds the model, and whose forward gives the sum of the losses of a micro-batch.

Model and loss are one module because they are wrapped as one: the vocabulary head belongs to both, and its parameters
are there, whole, only inside of the wrapped forward.
Shapes: B rows of a micro-batch, T tokens of a row, V vocabulary.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from model.loss import token_loss_sum


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
