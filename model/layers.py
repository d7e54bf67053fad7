"""The decoder layers of a model, their matrices and their dropout."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order. FSDP, compilation, checkpointing, memory, Muon and float8 use this definition.

    A layer is a GradientCheckpointingLayer of transformers. In the few models without any, it is a module whose class
    is named in `_no_split_modules`. Layers are not nested. Returns an empty list if the model has neither. In a
    multimodal model, only layers of the text model count, because tokens do not run through the other layers.
    """
    whole, model = model, text_model(model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        names = set(getattr(whole, "_no_split_modules", None) or ())
        # Compare base classes too, because fully_shard replaces the class of a module by a subclass.
        layers = [module for module in model.modules() if names & {base.__name__ for base in type(module).__mro__}]
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def text_model(model: nn.Module) -> nn.Module:
    """The innermost model of transformers within `model` that contains the embedding of tokens; else `model` itself."""
    try:
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # remote code
        embedding = None
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return next((one for one in reversed(models) if embedding in list(one.modules())), model)


def freeze_unused(model: PreTrainedModel) -> None:
    """Freeze what tokens do not run through in a multimodal model: all but its text model and its head."""
    if model.config.get_text_config() is model.config:
        return
    head = model.get_output_embeddings()
    used = {id(tensor) for module in (text_model(model), head) if module is not None for tensor in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in used)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `tensor`: that of torch.autocast if it is on, otherwise of the tensor."""
    device = tensor.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


def random_noise(model: nn.Module) -> str:
    """The dropout or router noise of the decoder layers in training, as text; "" if there is none."""
    for layer in decoder_layers(model):
        for module in layer.modules():
            for name, value in vars(module).items():
                is_noise = "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
                if is_noise and isinstance(value, float) and value > 0:
                    return f"{name} {value} in its {type(module).__name__}"
    return ""


def decoder_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices of the decoder layers by name, without embedding and head. `--optim muon` updates them."""
    within = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in within and parameter.dim() == 2 and parameter.requires_grad
    }
