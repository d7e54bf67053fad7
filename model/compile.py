"""Compilation of decoder layers: operations between matrix products are fused, and fewer activations are saved.

Shapes: B sequences, T tokens of a sequence, H query heads, K key and value heads, E head_dim.
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from config.options import Options
from model.documents.recurrent import restarts_at_documents
from model.experts import is_experts
from model.float8 import Float8Linear
from model.layers import decoder_layers, random_noise

Shape = tuple[int, int, int, int]

_attention_flops: Callable[[Shape, Shape, Shape], int] = flop_counter.sdpa_flop_count


def compile_layers(model: PreTrainedModel, options: Options, packing: str) -> None:
    """Make each decoder layer compile when it first runs. Must be called before wrapping.

    Equal layers share one compilation. One graph of the full model is slower and takes longer to compile. If the
    sequence length changes between batches, a layer compiles a second time, for any length. With `packing` concat, it
    compiles for each shape instead, because there are few: those of training, evaluation and its last batch. Otherwise
    a resumed run, which sees these shapes in another order, would add numbers in another order.
    `activation_memory_budget` is the fraction of a layer's activations that may be saved for the backward pass: the
    compiler chooses the cheapest ones to recompute (a knapsack problem).

    With gradient checkpointing, the recomputation is compiled together with the backward pass, and omits what that does
    not need, such as the last matrix product of the layer. In these cases, transformers recomputes the compiled layer
    instead: offloaded inputs; tensor or context parallelism, because torch 2.11 would save the results of collectives;
    dropout, which torch 2.11 cannot compile inside checkpointing on a GPU; and experts that are split, or that do not
    compute with model/experts.py, and modules that restart at documents (model/documents/recurrent.py), because a layer
    with graph breaks would not be compiled at all.
    """
    set_recomputation(options.activation_memory_budget)
    # Otherwise, graphs would be cut where a bucket of DDP ends, to all-reduce it a little earlier. Tensors between the
    # subgraphs would be saved, a fifth more activations.
    torch._dynamo.config.optimize_ddp = False
    # Kinds of layers, a first and any length, with or without a window, training and evaluation need more graphs than
    # the default of 8.
    torch._dynamo.config.recompile_limit = 64
    experts = any(name.endswith("experts") and not is_experts(module) for name, module in model.named_modules())
    split = options.model_parallel_size > 1 or options.expert_parallel > 1
    graph_breaks = experts or restarts_at_documents(model)
    by_transformers = options.offload_activations or split or graph_breaks or random_noise(model)
    # torch 2.11 warns of in-place operations in what is recomputed. Layers have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in decoder_layers(model):
        forward = layer.forward
        if getattr(layer, "gradient_checkpointing", False) and not by_transformers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]  # transformers' own
            forward = MethodType(_checkpointed_forward, layer)
        # Only the forward function, because the hooks of FSDP in __call__ cannot be compiled.
        layer.forward = torch.compile(forward, dynamic=False if packing == "concat" else None)


def _checkpointed_forward(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The forward pass of a layer that saves only its inputs, and is recomputed in the backward pass."""
    old = torch.__version__ < (2, 13)  # type: ignore[operator]
    if old and any(isinstance(module, Float8Linear) for module in layer.modules()):
        # Operations of an autograd function are not marked as recomputed there: all products in float8 would be saved.
        named["context_fn"] = _mark_all
    return checkpoint(type(layer).forward, layer, *inputs, use_reentrant=False, **named)


def _mark_all() -> Any:
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)  # type: ignore[no-untyped-call]


def set_recomputation(memory_budget: float | None) -> None:
    """Make the compiler recompute elementwise functions of saved activations, such as inputs of matrix products.

    This saves a fifth of the activations of a layer. Recomputation is fused into kernels of the backward pass.
    `memory_budget` is the fraction of activations that may be saved; None sets no limit.
    """
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._functorch.config.activation_memory_budget = 1.0 if memory_budget is None else memory_budget
    # The compiler estimates the cost of recomputation by floating-point operations.
    flop_counter.sdpa_flop_count = _grouped_attention_flops


def _grouped_attention_flops(query_BHTE: Shape, key_BKTE: Shape, value_BKTE: Shape) -> int:
    """Counts as if each query head had its own key head, because torch 2.11 refuses to count grouped queries."""
    key_BHTE, value_BHTE = ((shape[0], query_BHTE[1], *shape[2:]) for shape in (key_BKTE, value_BKTE))
    return _attention_flops(query_BHTE, key_BHTE, value_BHTE)
