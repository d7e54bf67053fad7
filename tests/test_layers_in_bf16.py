"""What layers compute with in bf16: copies of their weights; and the sum that they add to."""

import pytest
import torch
from torch import Tensor, nn
from transformers import CTRLConfig, GPT2Config

from config.errors import OptionError
from config.options import Options
from loss.next_token import NextToken
from model.build import build_model
from model.layers import decoder_layers
from model.linear import CopiedLinear, linear_modules
from tests.families import FAMILIES, drawn
from tests.proof import relative_l2
from tests.test_packing import loss_and_gradient

BATCH = {name: torch.arange(96).view(3, 32) * 3 % 380 for name in ("input_ids", "labels")}


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3 moe", "gemma3"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_autocast_makes(name: str, bf16: bool) -> None:
    """The CPU has no product of bf16 with a result in fp32: all is as it is without, but for sums of biases."""
    plain, ours = (drawn(Options(bf16=copied), FAMILIES[name][0]) for copied in (False, True))
    assert {type(module) for module in linear_modules(ours)} == {CopiedLinear}
    assert type(ours.get_output_embeddings()) is nn.Linear
    (expected_loss, expected), (loss, gradient) = (loss_and_gradient(model, [BATCH], bf16) for model in (plain, ours))
    assert loss == expected_loss
    biases = {key for key in expected if key.endswith("bias")}
    assert bool(biases) == (name == "qwen2")
    assert all(torch.equal(gradient[key], expected[key]) for key in expected.keys() - biases)
    for key in biases:
        assert relative_l2({key: gradient[key]}, {key: expected[key]}) < (1e-2 if bf16 else 1e-6)


def test_copies_are_never_stale() -> None:
    """Whatever changes a weight, the next forward has a copy of what it is then. No file has it."""
    model = drawn(Options(bf16=True), FAMILIES["qwen3"][0])
    names, modules = model.state_dict().keys(), linear_modules(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for change in (lambda: None, optimizer.step, lambda: modules[0].weight.data.mul_(2)):
        change()
        loss_and_gradient(model, [BATCH], bf16=True)
        for module in modules:
            assert torch.equal(module.get_buffer("weight_copy"), module.weight.bfloat16())
    assert model.state_dict().keys() == names


def test_copies_are_what_is_multiplied() -> None:
    model = drawn(Options(bf16=True), FAMILIES["qwen3"][0])
    loss_and_gradient(model, [BATCH], bf16=True)
    first = linear_modules(model)[0]
    input_BTD = torch.randn(2, 3, first.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        before = first(input_BTD)
        first.get_buffer("weight_copy").mul_(2)
        assert torch.equal(first(input_BTD), 2 * before)
    torch.testing.assert_close(first(input_BTD), nn.functional.linear(input_BTD, first.weight))


def test_layers_without_linear_modules() -> None:
    """They have nothing to copy, and train as before."""
    gpt2 = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    (_, expected), (_, gradient) = (
        loss_and_gradient(drawn(Options(bf16=bf16), gpt2), [BATCH], bf16) for bf16 in (False, True)
    )
    assert 1e-4 < relative_l2(gradient, expected) < 2e-2


def test_which_have_copies() -> None:
    """Layers whose parameters are whole, and fp32, while their matrix products are bf16; unless memory is saved."""
    assert Options(bf16=True).copies_weights
    for other in (
        Options(bf16=True, strategy="fsdp"),
        Options(bf16=False),
        Options(bf16=True, float8=True),
        Options(bf16=True, gradient_checkpointing=True),
        Options(bf16=True, torch_compile=True, activation_memory_budget=0.5),
    ):
        assert not other.copies_weights


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_residual(name: str) -> None:
    """Every layer is given bf16, and the gradient is one in bf16; without the option, fp32 goes through."""
    exact = drawn(Options(bf16=False), FAMILIES[name][0])
    _, expected = loss_and_gradient(exact, [BATCH])
    for bf16_residual, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        built = drawn(Options(bf16=True, bf16_residual=bf16_residual), FAMILIES[name][0])
        assert NextToken(built).ends_with_head == NextToken(exact).ends_with_head
        seen: set[torch.dtype] = set()

        def see(layer: torch.nn.Module, inputs: tuple[Tensor, ...], seen: set[torch.dtype] = seen) -> None:
            if torch.is_autocast_enabled("cpu"):  # and not in the trial of what the model ends with
                seen.add(inputs[0].dtype)

        for layer in decoder_layers(built):
            layer.register_forward_pre_hook(see)
        _, gradient = loss_and_gradient(built, [BATCH], bf16=True)
        assert seen == {dtype}
        assert 1e-4 < relative_l2(gradient, expected) < 2e-2


def test_layers_that_are_called_by_name() -> None:
    """Such code may come with a model; and one that has no layers has nothing to round."""
    layer = decoder_layers(drawn(Options(bf16=True, bf16_residual=True), FAMILIES["qwen3"][0]))[0]
    hidden_BTD, rotation = torch.randn(1, 2, 32), (torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        output_BTD = layer(hidden_states=hidden_BTD, position_embeddings=rotation, attention_mask=None)
    assert output_BTD.dtype == torch.bfloat16
    with pytest.raises(OptionError, match="bf16_residual true: CTRLLMHeadModel has no layers"):
        build_model(Options(bf16=True, bf16_residual=True), CTRLConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
