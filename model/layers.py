"""The decoder layers of a model, and what of them is treated apart from the rest."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what is one unit for FSDP, for compilation and for checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix product of `tensor` is in: the dtype of torch.autocast where that is on, or its own."""
    device = tensor.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


class Heads(NamedTuple):
    """The attention of a layer: heads of queries, those of keys and values, and the entries of each."""

    queries: int
    keys: int
    entries: int


def heads_of(config: PretrainedConfig) -> Heads:
    """What a model's configuration says of them, or leaves to follow from its width."""
    config = config.get_text_config()
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries)


def drawn_at_random(model: nn.Module) -> str:
    """What the decoder layers draw while they learn, in words: shares of dropout, noise of a router; "" for nothing."""
    for layer in layers_of(model):
        for module in layer.modules():
            for name, value in vars(module).items():
                named_so = "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
                if named_so and isinstance(value, float) and value > 0:
                    return f"{name} {value} in its {type(module).__name__}"
    return ""


def matrices_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the decoder layers that learn, by name: what `--optim muon` updates. Not embedding and head."""
    within = {id(parameter) for layer in layers_of(model) for parameter in layer.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in within and parameter.dim() == 2 and parameter.requires_grad
    }


def planned(model: PreTrainedModel) -> dict[str, str]:
    """How ranks would divide the modules of a model, by name, as its configuration plans it: "colwise", "rowwise", ...

    Of a model that has such a plan. Embedding and head are divided by rows, whatever it says of them.
    """
    plan = {f"{model.base_model_prefix}.{key}": style for key, style in model.config.base_model_tp_plan.items()}
    names = {name: re.sub(r"\.\d+(?=\.)", ".*", name) for name, _ in model.named_modules()}
    return {name: plan[each] for name, each in names.items() if each in plan}
