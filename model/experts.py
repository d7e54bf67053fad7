"""The experts of a layer: their matrix products, for tokens that are sorted by expert.

Shapes: N tokens, each for one expert; E experts; D hidden size.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear


def grouped_mlp(module: nn.Module, tokens_ND: Tensor, ends_E: Tensor) -> Tensor:
    """The outputs [N, D] of the experts of `module`, before the weights of the router.

    `module` follows the experts interface of transformers. `tokens_ND` are sorted by expert, and `ends_E` (int32) is
    the end of each expert's tokens. Some experts may have none.
    """
    bias = [None, None]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if module.has_bias:
        expert_N = torch.searchsorted(ends_E, torch.arange(len(tokens_ND), device=ends_E.device), right=True)
        bias = [getattr(module, f"{name}_bias")[expert_N] for name in (first, "down_proj")]
    inner = _grouped_linear(tokens_ND, getattr(module, first), ends_E, bias[0], module.is_transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]
    return _grouped_linear(inner, module.down_proj, ends_E, bias[1], module.is_transposed)
