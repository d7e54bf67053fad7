"""Proves --bf16_residual (model/build.py): the residual stream is bf16."""

import pytest
import torch
from torch import Tensor

from config.options import Options
from loss.next_token import NextToken
from model.layers import decoder_layers
from tests.families import FAMILIES, drawn
from tests.proof import relative_l2
from tests.test_packing import loss_and_gradient

BATCH = {name: torch.arange(96).view(3, 32) * 3 % 380 for name in ("input_ids", "labels")}


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_residual(name: str) -> None:
    """The input of each layer and its gradient are bf16; without the option, they are fp32."""
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
    """Remote code may pass hidden states by keyword."""
    layer = decoder_layers(drawn(Options(bf16=True, bf16_residual=True), FAMILIES["qwen3"][0]))[0]
    hidden_BTD, rotation = torch.randn(1, 2, 32), (torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        output_BTD = layer(hidden_states=hidden_BTD, position_embeddings=rotation, attention_mask=None)
    assert output_BTD.dtype == torch.bfloat16
