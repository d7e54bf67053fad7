"""The collectives of one optimizer step on a rank, by kind: how many, and how many bytes.

The bytes of a collective are those of the full tensor that is gathered or reduced. compare/scaling.py has
the bytes on a link, and docs/scaling.md has these formulas in a table. N is the number of parameters, L the number of
decoder layers, W the number of ranks that share shards, k the number of micro-steps.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from config.options import Options
from ddp.optimizer import gather_buckets
from estimate.activations import BF16, FP32, of_local_sequence, sequences_per_micro_batch
from estimate.memory import numel
from loss.cross_entropy import CHUNK_LOGITS
from loss.next_token import ends_with_head
from model.layers import decoder_layers, decoder_matrices
from parallel.checks import attention_heads, expert_modules
from parallel.tensor import split_on_meta

# The default bucket sizes of DistributedDataParallel, in bytes: a full bucket is all-reduced at once.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20

INT64 = 8


class Collectives(NamedTuple):
    """The collectives of one kind."""

    calls: int
    size: int  # bytes of all calls together


def predict_collectives(model: PreTrainedModel, options: Options, ranks: int) -> dict[str, Collectives]:
    """The collectives of a step, by kind, for `model` on the meta device; kinds without a call are left out.

    Every stage: one all-reduce of five integers, the counts of the global batch and the events.

    DDP: one all-reduce of all gradients, in buckets, 4 N bytes. With a sharded optimizer, ranks then all-gather the
    updated shards in buckets of 64 MiB, 4 N bytes. Rows are padded to a multiple of W.

    Muon with sharded matrices: two all-to-alls for every W matrices, in the dtype of computation. The bytes are those
    of rank 0: its full matrix, or its rows of all W matrices if these are more. Experts are sharded as whole matrices,
    so Muon communicates none of them.

    FSDP, for each of L + 1 units (each layer, and the root): in each micro-step, two all-gathers of its parameters, in
    bf16 or fp32, for the forward and for the backward. A unit that is not resharded after its forward, as the root
    always is, is gathered once before its gradients are reduced. That happens in the last micro-step, or in each with
    sync_each_batch: one reduce-scatter of the unit's gradients, in reduce_dtype, and with replicas one all-reduce of
    the resulting shard. One all-reduce of a sum of squares gives the norm. Rows are padded to a multiple of W. A single
    rank communicates nothing.

    With tensor parallelism, this holds for the parameters after the split, and `tensor_parallel_collectives` are added;
    with context parallelism, `context_parallel_collectives`. With expert parallelism over P ranks, the experts of a
    layer are a unit of their own among W / P ranks, 1 / P of it, and `expert_parallel_collectives` are added.
    """
    if options.context_parallel > 1:
        alone = predict_collectives(model, dataclasses.replace(options, context_parallel=1), ranks)
        return _sum(alone, context_parallel_collectives(model, options))
    if options.tensor_parallel > 1:
        split_model, ranks = split_on_meta(model, options.tensor_parallel), ranks // options.tensor_parallel
        after_split = predict_collectives(split_model, dataclasses.replace(options, tensor_parallel=1), ranks)
        return _sum(after_split, tensor_parallel_collectives(model, split_model, options))
    kinds: dict[str, list[int]] = {"all_reduce": [5 * INT64], "all_gather": [], "reduce_scatter": []}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shards, compute_bytes = ranks // options.replicas, BF16 if options.bf16 else FP32
    if options.optim == "muon" and shards > 1 and (options.strategy == "fsdp" or options.shard_optimizer):
        sharded_by_rows = [matrix for matrix in decoder_matrices(model).values() if matrix.dim() == 2]
        matrices = sorted(sharded_by_rows, key=lambda matrix: -matrix.numel())
        batches = [matrices[first : first + shards] for first in range(0, len(matrices), shards)]
        kinds["all_to_all"] = [
            compute_bytes * max(numel(batch[:1]), numel(batch, shards)) for batch in batches for _ in "12"
        ]
    if options.strategy == "ddp":
        if ranks > 1:
            kinds["all_reduce"] += buckets(parameters)
        if options.shard_optimizer:
            gathered = [sum(size for _, _, size in bucket) for bucket in gather_buckets(parameters, ranks)]
            kinds["all_gather"] += [FP32 * ranks * size for size in gathered]
        return {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in kinds.items() if sizes}

    reduced = FP32 if options.reduce_dtype == "float32" else BF16
    micro_steps = options.gradient_accumulation_steps
    reductions = micro_steps if options.sync_each_batch else 1
    of_layer = 2 * micro_steps if options.reshard_after_forward else reductions
    layers = decoder_layers(model)
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    root = [parameter for parameter in parameters if id(parameter) not in in_layers]
    experts = [list(module.parameters()) for module in expert_modules(model)] if options.expert_parallel > 1 else []
    in_experts = {id(parameter) for unit in experts for parameter in unit}
    others = [[each for each in layer.parameters() if id(each) not in in_experts] for layer in layers]
    for unit, gathers, group in [
        (root, reductions, shards),
        *((unit, of_layer, shards) for unit in others),
        *((unit, of_layer, shards // options.expert_parallel) for unit in experts),
    ]:
        padded = numel(unit, shards) * group
        if group > 1:
            kinds["all_gather"] += [compute_bytes * padded] * gathers
            kinds["reduce_scatter"] += [reduced * padded] * reductions
        if options.replicas > 1:
            kinds["all_reduce"] += [reduced * padded // shards] * reductions
    kinds["all_reduce"] += [FP32]
    predicted = {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in kinds.items() if sizes}
    return _sum(predicted, expert_parallel_collectives(model, options)) if experts else predicted


def expert_parallel_collectives(model: PreTrainedModel, options: Options) -> dict[str, Collectives]:
    """The all-to-alls of tokens within an expert-parallel group (parallel/experts.py), for experts with equal loads.

    In each micro-step, a layer with experts has four in its forward: of the number of tokens for each expert, of tokens
    to their experts, of the router's weights, and of outputs back. It has three of gradients in its backward. A token
    travels once for each of its experts, in the dtype of computation. With gradient checkpointing, a layer's second
    forward repeats all four.
    """
    config, compute_bytes = model.config.get_text_config(), BF16 if options.bf16 else FP32
    choices = getattr(config, "num_experts_per_tok", None) or config.top_k_experts  # the second: Gemma 4
    tokens = sequences_per_micro_batch(options) * (options.block_size or 0) * choices
    again = options.gradient_checkpointing
    calls, size = 0, 0
    for module in expert_modules(model):
        numbers = INT64 * len(next(module.parameters()))
        calls += 7 + 4 * again
        size += (1 + again) * numbers + (2 + again) * compute_bytes * tokens
        size += (4 + 2 * again) * compute_bytes * tokens * config.hidden_size
    micro_steps = options.gradient_accumulation_steps
    return {"all_to_all": Collectives(micro_steps * calls, micro_steps * size)}


def tensor_parallel_collectives(
    model: PreTrainedModel, split_model: PreTrainedModel, options: Options
) -> dict[str, Collectives]:
    """The collectives within a tensor-parallel group (parallel/tensor.py); `split_model` is the model after the split.

    In each micro-step, of the hidden states in the dtype of computation: 4 L + 4 all-gathers and 4 L + 2
    reduce-scatters. A layer has two of both, for attention and for the MLP, in its forward and in its backward. The
    embedding has one of both, and an all-gather in its backward, like the input of the first layer; the head has an
    all-gather, and a reduce-scatter in its backward. With gradient checkpointing, a layer's second forward repeats its
    all-gathers and one reduce-scatter, because it stops at the last saved tensor; a compiled layer repeats both.

    For each chunk of the loss: an all-gather of two fp32 numbers per token and rank, or of all logits if the model
    changes its logits after the head. For each unit: an all-reduce of the gradients of replicated parameters.
    """
    assert options.block_size
    group, compute_bytes, layers = options.tensor_parallel, BF16 if options.bf16 else FP32, len(decoder_layers(model))
    tokens = sequences_per_micro_batch(options) * math.ceil(options.block_size / group) * group
    hidden = compute_bytes * tokens * model.config.hidden_size
    again = options.gradient_checkpointing * layers
    gathers = 4 * layers + 4 + 2 * again
    scatters = 4 * layers + 2 + (2 if options.torch_compile else 1) * again
    if options.objective != "dpo" and ends_with_head(model):
        chunks = math.ceil(tokens * len(split_model.get_output_embeddings().weight) / CHUNK_LOGITS["cuda"])
        loss = Collectives(chunks, 2 * FP32 * group * tokens)
    else:
        loss = Collectives(1, compute_bytes * tokens * model.config.vocab_size)
    both = zip(model.parameters(), split_model.parameters(), strict=True)
    replicated = compute_bytes * sum(full.numel() for full, of_rank in both if full.numel() == of_rank.numel())
    of_micro_step = {
        "all_gather": Collectives(gathers + loss.calls, gathers * hidden + loss.size),
        "reduce_scatter": Collectives(scatters, scatters * hidden),
        "all_reduce": Collectives(layers + 1, replicated),
    }
    return _sum(*[of_micro_step] * options.gradient_accumulation_steps)


def context_parallel_collectives(model: PreTrainedModel, options: Options) -> dict[str, Collectives]:
    """The all-to-alls of attention within a context-parallel group (parallel/context.py).

    In each micro-step, a layer has two in its forward and two in its backward, in the dtype of computation: of all
    heads of queries, keys and values at a rank's positions, and of the attention output. With gradient checkpointing, a
    layer's second forward repeats both.
    """
    heads, compute_bytes = attention_heads(model.config), BF16 if options.bf16 else FP32
    tokens = sequences_per_micro_batch(options) * (of_local_sequence(options).block_size or 0)
    of_head = compute_bytes * tokens * heads.head_dim
    qkv_bytes = of_head * (heads.queries + 2 * math.lcm(heads.key_values, options.context_parallel))
    output_bytes = of_head * heads.queries
    calls = options.gradient_accumulation_steps * len(decoder_layers(model))
    again = options.gradient_checkpointing
    return {"all_to_all": Collectives(calls * (4 + 2 * again), calls * (2 + again) * (qkv_bytes + output_bytes))}


def _sum(*summands: dict[str, Collectives]) -> dict[str, Collectives]:
    """Add the collectives of each kind."""
    calls: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    for summand in summands:
        for kind, one in summand.items():
            calls[kind] += one.calls
            size[kind] += one.size
    return {kind: Collectives(calls[kind], size[kind]) for kind in calls}


def buckets(parameters: Iterable[Tensor]) -> list[int]:
    """Bytes of DDP's buckets. They take parameters from the last to the first, in the order of their gradients."""
    sizes, limit = [0], FIRST_BUCKET
    for parameter in reversed(list(parameters)):
        if sizes[-1] >= limit:
            sizes.append(0)
            limit = BUCKET
        sizes[-1] += FP32 * parameter.numel()
    return sizes
