"""What a step minimizes: a module that holds the model, and whose forward gives the sum of the losses of a micro-batch.

Model and loss are one module because they are wrapped as one: the vocabulary head belongs to both, and its parameters
are there, whole, only inside of the wrapped forward.
Shapes: B rows of a micro-batch, T tokens of a row, D width of the model.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from loss.cross_entropy import InPlace, cross_entropy_, head_and_loss_sum, softmax_, token_loss_sum


class NextToken(nn.Module):
    """Next-token prediction. Head and loss are computed as one, unless the model does more than its head at the end."""

    needs_initial_model = False

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.compiled = compiled
        self.ends_with_head = ends_with_head(model)
        self.cross_entropy_ = partial(cross_entropy_, softmax_=fastest_softmax() if compiled else softmax_)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        document_ends: Tensor | None = None,
    ) -> Tensor:
        """The sum of the cross entropies of all targets: a scalar in fp32. `input_ids` and `labels` are int64 [B, T].

        Labels are the input ids, or IGNORE_INDEX: the loss shifts them by one. data/batches.py says what keeps the documents
        of a row apart; without it, a row is one document.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "document_ends": document_ends}
        if not self.ends_with_head:
            return token_loss_sum(self.model(**inputs, use_cache=False).logits, labels)
        head = self.model.get_output_embeddings()
        with bypass_head(head):
            hidden_BTD = self.model(**inputs, use_cache=False).logits
        return head_and_loss_sum(hidden_BTD, head.weight, head.bias, labels, self.cross_entropy_)


def fastest_softmax() -> InPlace:
    """The kernel for a GPU, where there is one; what torch.compile makes of the plain softmax elsewhere."""
    if not torch.cuda.is_available():
        return torch.compile(softmax_)
    from loss.softmax import softmax_ as kernel  # it needs Triton, as compiled layers do

    return kernel


@contextlib.contextmanager
def bypass_head(head: nn.Module) -> Iterator[list[Tensor]]:
    """In here, the model gives as its logits what its head was given, which is also put into the list."""
    given: list[Tensor] = []

    def forward(hidden_BTD: Tensor) -> Tensor:
        given.append(hidden_BTD)
        return hidden_BTD

    head.forward = forward
    try:
        yield given
    finally:
        del head.forward  # what is left is the method of its class


def ends_with_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are what a linear head makes, and nothing else: no cap (Gemma 2), no scale (Granite).

    Found by trying, on tensors that have shapes and no values: it costs a tenth of a second and no memory. A model that
    cannot be run so (routed experts, so far) counts as one that does more, which is always right.
    """
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    if type(head) is not nn.Linear:
        return False
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print why
    try:
        with bypass_head(head) as given, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False).logits
    except Exception:
        return False
    return len(given) == 1 and logits is given[0]
