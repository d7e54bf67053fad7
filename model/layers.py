"""The decoder layers of a model, and what of them is treated apart from the rest."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what is one unit for FSDP, for compilation and for checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def matrices_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the decoder layers that learn, by name: what `--optim muon` updates. Not embedding and head."""
    within = {id(parameter) for layer in layers_of(model) for parameter in layer.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in within and parameter.dim() == 2 and parameter.requires_grad
    }
