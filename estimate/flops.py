"""The floating-point operations of a training step.

Shapes: B sequences, T tokens of a sequence, H query heads, E head_dim.
"""

import copy
import functools
import logging
import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from config.errors import OptionError, first_line
from model.adapters import adapter_parameters
from model.documents.kernels import torch_kernels
from model.layers import decoder_layers, decoder_matrices, expert_stacks
from parallel.checks import attention_heads

TRIAL = 61  # tokens of the trial: a prime, so that a dimension of this size is one of positions


class Attention(NamedTuple):
    """One call of attention by a layer."""

    size: int  # H x (head_dim of keys + head_dim of values)
    window: int | None = None  # keys at most
    chunked: bool = False  # the window begins anew after as many positions

    def keys(self, tokens: int) -> float:
        """The keys that a query of a sequence attends to, on average."""
        if self.window is None or self.window >= tokens:
            return tokens / 2
        return self.window / 2 if self.chunked else self.window * (1 - self.window / (2 * tokens))


class Uses(NamedTuple):
    """What a forward pass multiplies."""

    products: float  # parameters that a token is multiplied with, once for each time
    attention: list[Attention]


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float | None:
    """Floating-point operations of one forward and backward pass, per token; None if they cannot be counted.

    6 per weight that a token is multiplied with (2 forward, 4 backward; Kaplan et al. 2020, section 2.1). With
    adapters, 4 per frozen weight, because it has no gradient, and 6 per weight of an adapter. Weights of
    experts count by the fraction of experts that a token is sent to, and weights of a block that runs several times
    count as often. For attention, 12 x H x E for each pair of a query and a key, in each layer. A query has T / 2 keys,
    because attention is causal, and w (1 - w / 2 T) with a window of w < T positions that the layer tells its attention
    function. Linear attention and state spaces count by their projections and convolutions, without the recurrence.
    Recomputation by activation checkpointing is not counted, so that MFU means useful work. `model` may be wrapped,
    because the count is for its class and configuration.
    """
    uses = count_uses(model)
    if isinstance(uses, str):
        return None
    attention = sum(call.size * call.keys(sequence_length) for call in uses.attention)
    if adapters := sum(parameter.numel() for parameter in adapter_parameters(model).values()):
        return 4 * uses.products + 6 * (adapters + attention)
    return 6 * (uses.products + attention)


@functools.lru_cache(maxsize=4)
def count_uses(model: PreTrainedModel) -> Uses | str:
    """What a token is multiplied with; or in words, why this cannot be counted.

    A copy of the model runs one sequence without values. Experts do not run, because routing depends on values. For a
    model that does not run this way, its modules and its configuration tell.
    """
    with torch.device("meta"):
        model = type(model)(copy.deepcopy(model.config)).float()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print caught errors
    attention: list[Attention] = []
    products_of_experts = _skip_experts(model)

    def record(
        module: nn.Module,
        query_BHTE: Tensor,
        key_BKTE: Tensor,
        value_BKTE: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        heads, window, chunked = query_BHTE.shape[1], sliding_window, False
        kinds, index = getattr(model.config.get_text_config(), "layer_types", None), getattr(module, "layer_idx", None)
        if kinds and index is not None and kinds[index] == "chunked_attention":
            window, chunked = model.config.get_text_config().attention_chunk_size, True
        attention.append(Attention(heads * (query_BHTE.shape[-1] + value_BKTE.shape[-1]), window, chunked))
        return query_BHTE.new_zeros(*query_BHTE.transpose(1, 2).shape[:3], value_BKTE.shape[-1]), None

    AttentionInterface.register("counted", record)
    AttentionMaskInterface.register("counted", eager_mask)  # some layers also use the mask themselves
    model.eval()  # in training, OPT draws which layers to skip
    try:
        model.set_attn_implementation("counted")
        with torch_kernels(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.to_empty(device="cpu")
            model.tie_weights()
            ids_BT = torch.zeros(1, TRIAL, dtype=torch.int64)
            with Products({_id(parameter) for parameter in model.parameters()}) as products:
                model(input_ids=ids_BT, use_cache=False)
    except Exception:  # its forward depends on values
        try:
            return _by_modules(model)
        except Exception as error:
            return f"{type(model).__name__} cannot be counted: {first_line(error)}"
    return Uses(products.parameters / TRIAL + sum(products_of_experts), attention or products.attention)


def _by_modules(model: PreTrainedModel) -> Uses:
    """What the modules of a model say: each matrix of a layer once, the head, and the heads of the configuration."""
    config, stacks, layers, products = model.config.get_text_config(), expert_stacks(model), decoder_layers(model), 0.0
    if not layers:
        raise OptionError("no decoder layers are found")
    for name, matrix in decoder_matrices(model).items():
        in_list = re.search(r"^(.*experts)\.\d+\.", name)  # a module for each expert
        if name in stacks:
            products += math.prod(stacks[name].entry) * _top_k(config)
        elif in_list:
            products += matrix.numel() * _top_k(config) / len(list(model.get_submodule(in_list[1]).children()))
        else:
            products += matrix.numel()
    heads = attention_heads(config)
    products += model.get_output_embeddings().weight.numel()
    return Uses(products, [Attention(heads.queries * 2 * heads.head_dim)] * len(layers))


def _top_k(config: PretrainedConfig) -> int:
    """The number of experts that a token is sent to. Raises OptionError for a configuration that does not say it."""
    for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts"):
        if value := getattr(config, name, None):
            return int(value)
    raise OptionError("its configuration does not say how many experts a token is sent to")


def _skip_experts(model: PreTrainedModel) -> list[float]:
    """Let the experts of a model return zeros. Each call appends the parameters that a token is multiplied with."""
    counted: list[float] = []
    of_module: dict[str, float] = defaultdict(float)  # parameters of one expert
    for name, stack in expert_stacks(model).items():
        words = name.split(".")[:-1]
        outermost = next((number for number, word in enumerate(words, 1) if "expert" in word), len(words))
        if "shared" not in words[outermost - 1]:  # each token goes through all of these
            of_module[".".join(words[:outermost])] += math.prod(stack.entry)
    config = model.config.get_text_config()
    for path, size in of_module.items():

        def forward(hidden: Tensor, *others: Any, size: float = size, **named: Any) -> Tensor:
            indices = [other for other in (*others, *named.values()) if isinstance(other, Tensor)]
            chosen = [index.numel() for index in indices if index.dim() == 2 and not index.is_floating_point()]
            counted.append(size * (chosen[0] / TRIAL if chosen else _top_k(config)))
            return torch.zeros_like(hidden)

        model.get_submodule(path).forward = forward
    return counted


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products within this context: with parameters, and between queries, keys and values."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages  # of the parameters, by their identity
        self.parameters = 0.0  # elements x rows that they are multiplied with
        self.attention: list[Attention] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name.removeprefix("aten::")
        if name == "convolution":
            self.parameters += args[1].numel() * TRIAL * (_id(args[1]) in self.storages)
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[-2:]
            if _id(left) in self.storages or _id(right) in self.storages:
                self.parameters += left.numel() * right.shape[-1]
            elif left.dim() == 3 and left.shape[1] == TRIAL and TRIAL in (right.shape[2], left.shape[2]):
                # Queries with keys, [B H, T, E] x [B H, E, T], or their weights with values, [B H, T, T] x [B H, T, E].
                other = left.shape[2] if right.shape[2] == TRIAL else right.shape[2]
                self.attention.append(Attention(left.shape[0] * other))
        elif name.startswith("_scaled_dot_product"):
            query_BHTE, _, value_BHTE = args[:3]
            self.attention.append(Attention(query_BHTE.shape[1] * (query_BHTE.shape[-1] + value_BHTE.shape[-1])))
        return result


def _id(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
