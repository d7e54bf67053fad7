"""The decoder layers of a model, and what of them is treated apart from the rest."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what is one unit for FSDP, for compilation and for checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


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
