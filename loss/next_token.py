"""Next-token prediction: a module that holds the model, and whose forward returns the summed loss of a micro-batch.

Model and loss are wrapped as one module because the loss uses the parameters of the vocabulary head, and FSDP gathers
them only inside the wrapped forward pass.
Shapes: B sequences of a micro-batch, T tokens of a sequence, D hidden size.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from loss.cross_entropy import InPlace, cross_entropy_, head_and_loss_sum, softmax_, token_loss_sum
from loss.router import RouterBalance, RouterBias, real_positions
from model.documents.kernels import torch_kernels
from model.experts import skipped_experts


class NextToken(nn.Module):
    """Next-token prediction. The loss applies the head in chunks if the model computes nothing after its head."""

    needs_initial_model = False

    def __init__(
        self,
        model: PreTrainedModel,
        compiled: bool = False,
        router_balance: RouterBalance | None = None,
        router_bias: RouterBias | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.compiled = compiled
        self.router_balance, self.router_bias = router_balance, router_bias
        self.ends_with_head = ends_with_head(model)
        self.cross_entropy_ = partial(cross_entropy_, softmax_=fastest_softmax() if compiled else softmax_)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        document_ends: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """The sum of the cross entropies of all targets: a scalar in fp32. `input_ids` and `labels` are int64 [B, T].

        Labels are the input ids, or IGNORE_INDEX where masked; the loss shifts them by one. `position_ids`, [B, T], and
        `document_ends`, int32, separate documents in a sequence (data/batches.py). Without them, it is one document.
        `tokens`, int64 [B], has the lengths without padding. In training, a mixture adds its load-balancing loss.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "document_ends": document_ends}
        balance = self.router_balance
        if self.router_bias is not None and tokens is not None:
            self.router_bias.real_S = real_positions(tokens, input_ids.shape)
        if balance is None or not (torch.is_grad_enabled() or balance.counting):
            return self.token_loss(inputs, labels)
        assert tokens is not None
        loss = self.token_loss(inputs | {"output_router_logits": True}, labels)
        if balance.counting:
            return balance.count(tokens, input_ids.shape)[0]
        return loss + balance.loss(tokens, input_ids.shape)

    def token_loss(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """The sum of the cross entropies of all targets, for the arguments `inputs` of the model."""
        if not self.ends_with_head:
            return token_loss_sum(self.model(**inputs, use_cache=False).logits, labels)
        head = self.model.get_output_embeddings()
        with bypass_head(head):
            hidden_BTD = self.model(**inputs, use_cache=False).logits
        return head_and_loss_sum(hidden_BTD, head.weight, head.bias, labels, self.cross_entropy_)


def fastest_softmax() -> InPlace:
    """The Triton kernel on a GPU, and the compiled softmax on a CPU."""
    if not torch.cuda.is_available():
        return torch.compile(softmax_)
    from loss.softmax import softmax_ as kernel  # needs Triton, which compiled layers need too

    return kernel


@contextlib.contextmanager
def bypass_head(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within this context, the model returns the inputs of its head as logits. They are also appended to the list."""
    inputs: list[Tensor] = []

    def forward(hidden_BTD: Tensor) -> Tensor:
        inputs.append(hidden_BTD)
        return hidden_BTD

    head.forward = forward
    try:
        yield inputs
    finally:
        del head.forward  # the method of its class remains


def ends_with_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output of a linear head, without a cap (Gemma 2) or a scale (Granite) after it.

    Runs the model on fake tensors, which costs a tenth of a second and no memory. Returns False for a model that cannot
    run on them, which is always correct: its loss is then computed from all logits.
    """
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    if type(head) is not nn.Linear:
        return False
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print the error
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with bypass_head(head) as inputs, skipped_experts(model), torch_kernels(), fake, torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False).logits
    except Exception:
        return False
    return len(inputs) == 1 and logits is inputs[0]
