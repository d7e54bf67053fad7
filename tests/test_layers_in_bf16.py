"""What layers compute with in bf16: copies of their weights; and the sum that they add to."""

import pytest
import torch
from torch import Tensor, nn

from config import Options
from model.build import build_model
from model.layers import layers_of
from model.linear import Linear, linear_modules
from model.objective import NextToken
from tests.families import FAMILIES, drawn
from tests.proof import relative_l2
from tests.test_packing import loss_and_gradient

BATCH = {name: torch.arange(96).view(3, 32) * 3 % 380 for name in ("input_ids", "labels")}


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3 moe", "gemma3"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_autocast_makes(name: str, bf16: bool) -> None:
    """The CPU has no product of bf16 with a result in fp32: all is as it is without, but for sums of biases."""
    plain, ours = (drawn(Options(bf16=copied), FAMILIES[name][0]) for copied in (False, True))
    assert {type(module) for module in linear_modules(ours)} == {Linear}
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
            assert torch.equal(module.get_buffer("copy"), module.weight.bfloat16())
    assert model.state_dict().keys() == names


def test_which_have_copies() -> None:
    """Layers whose parameters are whole, and fp32, while their matrix products are bf16; unless memory is saved."""
    for options, expected in (
        (Options(bf16=True), True),
        (Options(bf16=True, strategy="fsdp"), False),
        (Options(bf16=False), False),
        (Options(bf16=True, float8=True), False),
        (Options(bf16=True, gradient_checkpointing=True), False),
        (Options(bf16=True, torch_compile=True, activation_memory_budget=0.5), False),
    ):
        model = build_model(options, FAMILIES["qwen3"][0])
        assert any(type(module) is Linear for module in model.modules()) == expected


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

        for layer in layers_of(built):
            layer.register_forward_pre_hook(see)
        _, gradient = loss_and_gradient(built, [BATCH], bf16=True)
        assert seen == {dtype}
        assert 1e-4 < relative_l2(gradient, expected) < 2e-2
