"""The decoder layers of a model, and what of them is treated apart from the rest."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order: one unit each for FSDP, compilation, checkpointing, memory, Muon and float8.

    A layer is a GradientCheckpointingLayer of transformers; in the few models without any, a module whose class stands
    in `_no_split_modules`. No layer is within another. Returns an empty list for a model that marks neither.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        names = set(getattr(model, "_no_split_modules", None) or ())
        # Also by the names of base classes, because fully_shard replaces the class of a module by a derived one.
        layers = [module for module in model.modules() if names & {base.__name__ for base in type(module).__mro__}]
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix product of `tensor` is in: the dtype of torch.autocast where that is on, or its own."""
    device = tensor.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


def random_noise(model: nn.Module) -> str:
    """What the decoder layers draw while they learn, in words: shares of dropout, noise of a router; "" for nothing."""
    for layer in decoder_layers(model):
        for module in layer.modules():
            for name, value in vars(module).items():
                named_so = "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
                if named_so and isinstance(value, float) and value > 0:
                    return f"{name} {value} in its {type(module).__name__}"
    return ""


def decoder_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the decoder layers that learn, by name: what `--optim muon` updates. Not embedding and head."""
    within = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in within and parameter.dim() == 2 and parameter.requires_grad
    }
