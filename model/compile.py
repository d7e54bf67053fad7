"""Compilation: it fuses what lies between the matrix products of a layer, and keeps less for its backward."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from config.options import Options
from model.layers import decoder_layers, random_noise

Shape = tuple[int, int, int, int]

_operations_of_attention: Callable[[Shape, Shape, Shape], int] = flop_counter.sdpa_flop_count


def compile_layers(model: PreTrainedModel, options: Options) -> None:
    """Let each decoder layer be compiled when it first runs. Must be called before wrapping.

    Layers of one kind run the same code, one after another, and so are compiled once for all of them. The whole model
    as one graph is slower, and takes longer to compile. A length that changes from batch to batch is compiled once
    more, for any length. With an `activation_memory_budget`, no more than that share of a layer's activations is kept
    for its backward: the compiler solves which of them are the cheapest to compute again (a knapsack).

    With gradient checkpointing, the second forward is compiled together with the backward, and leaves out what that
    does not need: most of all the layer's last matrix product. Elsewhere, transformers computes again a layer that is
    compiled by itself: where its inputs are offloaded; where ranks divide it, or the rows, because torch 2.11 would
    keep what they gather and exchange; with dropout, which 2.11 cannot compile so on a GPU; and with experts, because a
    layer that is not one graph would not be compiled at all.
    """
    set_recomputation(options.activation_memory_budget)
    # DDP would have each layer cut where one of its buckets ends, so as to send it a little earlier. What passes
    # between the pieces is kept: a fifth more activations.
    torch._dynamo.config.optimize_ddp = False
    # A graph for each kind of layer, a first length and any, with or without a window, training and evaluation: more
    # than 8, the default.
    torch._dynamo.config.recompile_limit = 64
    experts = any("experts" in name for name, _ in model.named_modules())
    by_transformers = options.offload_activations or options.model_parallel_size > 1 or experts or random_noise(model)
    for layer in decoder_layers(model):
        forward = layer.forward
        if getattr(layer, "gradient_checkpointing", False) and not by_transformers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]  # that of transformers
            forward = MethodType(_forward_again, layer)
        # Not all of its call: what FSDP does before and after cannot be compiled.
        layer.forward = torch.compile(forward)


def _forward_again(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The forward of a layer that keeps its inputs, and is computed once more for the backward."""
    return checkpoint(type(layer).forward, layer, *inputs, use_reentrant=False, **named)


def set_recomputation(memory_budget: float | None) -> None:
    """Let what is an elementwise function of what is kept anyway not be kept beside it: inputs of most matrix products.

    A fifth of a layer's activations, computed again in passes over memory that the backward needs in any case. With a
    `memory_budget`, no more is kept than that share of what would be.
    """
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._functorch.config.activation_memory_budget = 1.0 if memory_budget is None else memory_budget
    # What is cheap to compute again is told by operations.
    flop_counter.sdpa_flop_count = _operations_of_grouped_attention


def _operations_of_grouped_attention(query_BHTE: Shape, key_BKTE: Shape, value_BKTE: Shape) -> int:
    """Where several heads of queries share one of keys, torch 2.11 refuses to count: as if each had its own."""
    key_BHTE, value_BHTE = ((shape[0], query_BHTE[1], *shape[2:]) for shape in (key_BKTE, value_BKTE))
    return _operations_of_attention(query_BHTE, key_BHTE, value_BHTE)
