"""The decoder layers of a model, their matrices and their dropout."""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


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


class Stack(NamedTuple):
    """How a parameter holds several matrices: one of each expert, or two if gate and up projection are fused."""

    entry: tuple[int, ...]  # shape of one expert's values; a fused gate and up have a dimension of 2
    halves: int | None = None  # that dimension of the stacked entries, counted with the experts as dimension 0

    def matrices(self, values: Tensor) -> Tensor:
        """The matrices [n, R, C] of a parameter or of a shard that has whole experts."""
        entries = values.reshape(-1, *self.entry)
        return entries if self.halves is None else entries.movedim(self.halves, 1).flatten(0, 1)

    def values(self, matrices_nRC: Tensor, shape: torch.Size) -> Tensor:
        """The reverse of `matrices`, in `shape`."""
        if self.halves is not None:
            matrices_nRC = matrices_nRC.reshape(-1, 2, *matrices_nRC.shape[1:]).movedim(1, self.halves)
        return matrices_nRC.reshape(shape)


def decoder_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices of products in the decoder layers, by name. `--optim muon` updates them.

    They are the weights of linear layers, the 2-D `weight` of a module of another class, such as a router, and the
    stacks of experts. Embeddings, convolutions, biases of experts, and elementwise factors such as Mamba's A_log are
    none, whatever their dimensions.
    """
    stacks, found = expert_stacks(model), {}
    within = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        is_weight = own_name == "weight" and parameter.dim() == 2
        is_matrix = name in stacks or (
            is_weight and not isinstance(model.get_submodule(path), nn.Embedding | CONVOLUTIONS)
        )
        if is_matrix and id(parameter) in within and parameter.requires_grad:
            found[name] = parameter
    return found


def expert_stacks(model: nn.Module) -> dict[str, Stack]:
    """The parameters that stack a matrix of each expert, by name: [E, R, C], or [E x R, C] (DBRX).

    They belong to a module with "expert" in its name or in the name of its class, and not to a convolution. Gate and
    up projection are fused if another stack of the same block takes half of the output. GPT-OSS interleaves them.
    """
    blocks: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    stacks: dict[str, Stack] = {}
    for path, module in model.named_modules():
        if "expert" not in f"{path}.{type(module).__name__}".lower() or isinstance(module, nn.Linear | CONVOLUTIONS):
            continue
        experts = getattr(module, "moe_num_experts", 0)
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own_name}"
            if parameter.dim() == 3:
                # A block is a module, or the parent of modules that have one weight each.
                blocks[path.rpartition(".")[0] if own_name == "weight" else path][name] = parameter
            elif parameter.dim() == 2 and experts and parameter.shape[0] > experts:
                stacks[name] = Stack((parameter.shape[0] // experts, parameter.shape[1]))
    for block in blocks.values():
        for name, parameter in block.items():
            module = model.get_submodule(name.rpartition(".")[0])
            others = [tuple(other.shape[1:]) for other in block.values()]
            stacks[name] = _stack(tuple(parameter.shape[1:]), others, getattr(module, "is_concatenated", True))
    return stacks


def _stack(shape: tuple[int, ...], others: list[tuple[int, ...]], concatenated: bool) -> Stack:
    rows, columns = shape
    if any(rows == 2 * inputs and columns == outputs for outputs, inputs in others):  # [E, out, in]
        return Stack((2, rows // 2, columns), 1) if concatenated else Stack((rows // 2, 2, columns), 2)
    if any(columns == 2 * inputs and rows == outputs for inputs, outputs in others):  # [E, in, out]
        return Stack((rows, 2, columns // 2), 2) if concatenated else Stack((rows, columns // 2, 2), 3)
    return Stack(shape)
