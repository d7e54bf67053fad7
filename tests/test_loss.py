"""Proves loss/cross_entropy.py and loss/next_token.py: the chunked loss equals the loss of all logits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, GPT2Config, GraniteConfig, Qwen3Config

import loss.cross_entropy
from data.batches import IGNORE_INDEX
from loss.cross_entropy import cross_entropy_, head_and_loss_sum, token_loss_sum
from loss.next_token import NextToken
from tests.proof import relative_l2

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, of which the last one is shorter."""
    monkeypatch.setattr(loss.cross_entropy, "CHUNK_LOGITS", {"cpu": 96 * 7})


@pytest.fixture
def labels_BT() -> Tensor:
    labels_BT = torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(1))
    labels_BT[0, 4:], labels_BT[2, :5] = IGNORE_INDEX, IGNORE_INDEX
    return labels_BT


def losses_and_gradients(objective: NextToken, labels_BT: Tensor, bf16: bool) -> tuple[float, float, dict[str, Tensor]]:
    """The loss in training and in evaluation, and the gradient of half the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = objective(labels_BT.clamp(0), labels_BT)
        with torch.no_grad():
            evaluated = objective(labels_BT.clamp(0), labels_BT)
    assert loss.dtype == evaluated.dtype == torch.float32
    learned = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    gradients = dict(zip(learned, torch.autograd.grad(loss * 0.5, list(learned.values())), strict=True))
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return loss.item(), evaluated.item(), gradients


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("head", ["tied", "untied", "bias", "frozen"])
def test_same_as_through_all_logits(labels_BT: Tensor, head: str, bf16: bool) -> None:
    torch.manual_seed(0)
    ours = NextToken(AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, tie_word_embeddings=head == "tied")))
    if head == "bias":
        ours.model.lm_head.bias = nn.Parameter(torch.randn(96))
    ours.model.lm_head.weight.requires_grad_(head != "frozen")
    theirs = copy.deepcopy(ours)
    assert ours.ends_with_head
    theirs.ends_with_head = False
    loss, evaluated, gradients = losses_and_gradients(ours, labels_BT, bf16)
    expected_loss, expected_evaluated, expected = losses_and_gradients(theirs, labels_BT, bf16)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert evaluated == pytest.approx(expected_evaluated, rel=1e-6)
    assert relative_l2(gradients, expected) < (2e-2 if bf16 else 1e-6)


def test_without_a_target(labels_BT: Tensor) -> None:
    """Masked positions contribute no loss and no gradient, whatever their values."""
    hidden_BTD, weight_VD = torch.randn(3, 11, 8, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    loss = head_and_loss_sum(hidden_BTD, weight_VD, None, torch.full_like(labels_BT, IGNORE_INDEX), cross_entropy_)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [hidden_BTD, weight_VD]))


def test_gradients_serve_once(labels_BT: Tensor) -> None:
    hidden_BTD, weight_VD = torch.randn(3, 11, 8, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    loss = head_and_loss_sum(hidden_BTD, weight_VD, None, labels_BT, cross_entropy_)
    torch.autograd.grad(loss, hidden_BTD, retain_graph=True)
    with pytest.raises(AttributeError):
        torch.autograd.grad(loss, hidden_BTD)


@pytest.mark.parametrize(
    ("config", "alone"),
    [
        (Qwen3Config(**SMALL), True),
        (GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0), True),
        (Gemma2Config(**SMALL, final_logit_softcapping=30.0), False),
        (Gemma2Config(**SMALL, final_logit_softcapping=None), True),
        (GraniteConfig(**SMALL, logits_scaling=8.0), False),
        (Cohere2Config(**SMALL, logit_scale=0.0625), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_what_comes_after_the_head(labels_BT: Tensor, config: Any, alone: bool) -> None:
    """A model that caps or scales its logits is detected, and its loss uses these logits."""
    model = AutoModelForCausalLM.from_config(config).eval()
    objective = NextToken(model)
    assert objective.ends_with_head == alone
    with torch.no_grad():
        expected = token_loss_sum(model(labels_BT.clamp(0)).logits, labels_BT).item()
    assert objective(labels_BT.clamp(0), labels_BT).item() == pytest.approx(expected, rel=1e-5)
    assert "forward" not in vars(model.get_output_embeddings())
