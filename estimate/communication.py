"""What a rank exchanges with others in one optimizer step: how many collectives of each kind, and how many bytes.

The bytes of a collective are those of the whole tensor: what is gathered, reduced or broadcast, not what a link carries
of it (compare/scaling.py has that). N is the number of parameters, L of decoder layers, W of ranks that share shards,
k of micro-steps; `docs/scaling.md` has the same as a table.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from config.options import Options
from estimate.activations import BF16, FP32, of_local_sequence, sequences_per_micro_batch
from estimate.memory import numel
from loss.cross_entropy import CHUNK_LOGITS
from loss.next_token import ends_with_head
from model.layers import decoder_layers, decoder_matrices
from parallel.checks import attention_heads
from parallel.tensor import split_on_meta

# DDP's own defaults (torch.nn.parallel.DistributedDataParallel): gradients travel as soon as so many bytes are there.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20

INT64 = 8


class Collectives(NamedTuple):
    """Those of one kind."""

    calls: int
    size: int  # bytes, of all of them


def predict_collectives(model: PreTrainedModel, options: Options, ranks: int) -> dict[str, Collectives]:
    """The collectives of a step, by kind, for `model` on the meta device. Nothing is there that does not happen.

    In any stage: one all-reduce of four integers, the counts of the global batch.

    DDP: all gradients, once, in buckets: all-reduce of 4 N bytes. With a sharded optimizer, each rank then broadcasts
    the part that it has updated: W broadcasts of 4 N bytes together.

    Muon, where ranks share rows: for every W matrices two all-to-alls, in the width of computing, of the matrix that a
    rank gets whole, or, where these are more, of its rows of all W. What rank 0 exchanges is counted.

    FSDP, for each of L + 1 units (a layer; the root): in each micro-step, two all-gathers of its parameters, in bf16 or
    fp32, one for the forward and one for the backward. Units that are kept whole after their forward, as the root
    always is, are gathered once before each exchange of gradients. That comes in the last micro-step, or in each with
    sync_each_batch: one reduce-scatter of a unit's gradients, in reduce_dtype, and, with replicas, one all-reduce of
    the shard that this gives. Once, a sum of squares, for the norm. Rows are filled up to a multiple of W. One rank
    alone gathers and reduces nothing.

    Where ranks divide each layer, all of this is said of a rank's part, and what `divided` gives comes to it; where
    they divide each row, what `attended` gives.
    """
    if options.context_parallel > 1:
        alone = predict_collectives(model, dataclasses.replace(options, context_parallel=1), ranks)
        return _sum(alone, context_parallel_collectives(model, options))
    if options.tensor_parallel > 1:
        part, ranks = split_on_meta(model, options.tensor_parallel), ranks // options.tensor_parallel
        of_part = predict_collectives(part, dataclasses.replace(options, tensor_parallel=1), ranks)
        return _sum(of_part, tensor_parallel_collectives(model, part, options))
    kinds: dict[str, list[int]] = {"all_reduce": [4 * INT64], "broadcast": [], "all_gather": [], "reduce_scatter": []}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shards, width = ranks // options.replicas, BF16 if options.bf16 else FP32
    if options.optim == "muon" and shards > 1 and (options.strategy == "fsdp" or options.shard_optimizer):
        matrices = sorted(decoder_matrices(model).values(), key=lambda matrix: -matrix.numel())
        batches = [matrices[first : first + shards] for first in range(0, len(matrices), shards)]
        kinds["all_to_all"] = [width * max(numel(batch[:1]), numel(batch, shards)) for batch in batches for _ in "12"]
    if options.strategy == "ddp":
        if ranks > 1:
            kinds["all_reduce"] += buckets(parameters)
        if options.shard_optimizer:
            kinds["broadcast"] += [FP32 * numel(parameters) // ranks] * ranks  # as if rows could always be divided
        return {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in kinds.items() if sizes}

    reduced = FP32 if options.reduce_dtype == "float32" else BF16
    micro_steps = options.gradient_accumulation_steps
    reductions = micro_steps if options.sync_each_batch else 1
    of_layer = 2 * micro_steps if options.reshard_after_forward else reductions
    layers = decoder_layers(model)
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    root = [parameter for parameter in parameters if id(parameter) not in in_layers]
    for unit, gathers in [(root, reductions), *((layer.parameters(), of_layer) for layer in layers)]:
        whole = numel(unit, shards) * shards
        if shards > 1:
            kinds["all_gather"] += [width * whole] * gathers
            kinds["reduce_scatter"] += [reduced * whole] * reductions
        if options.replicas > 1:
            kinds["all_reduce"] += [reduced * whole // shards] * reductions
    kinds["all_reduce"] += [FP32]
    return {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in kinds.items() if sizes}


def tensor_parallel_collectives(
    model: PreTrainedModel, part: PreTrainedModel, options: Options
) -> dict[str, Collectives]:
    """What ranks that divide each layer (fsdp/tensor_parallel.py) exchange among themselves; `part` is what one has.

    In each micro-step, of the hidden states, in the width of computing: 4 L + 4 all-gathers and 4 L + 2
    reduce-scatters. A layer has two of both, for attention and for the wider layer, in its forward and in its backward.
    The embedding has one of both, and a gather in its backward; so has the first layer there; the head has a gather,
    and a reduce-scatter in its backward. With gradient checkpointing, a layer's second forward repeats its gathers and
    one of its reduce-scatters, because it ends where nothing more is kept; a compiled layer repeats both.

    Of each chunk of the loss, a gather of two fp32 numbers from each rank for a token; or, where the model does more
    than its head at the end, one of all logits. Of each unit, an all-reduce of the gradients of what all have whole.
    """
    assert options.block_size
    group, width, layers = options.tensor_parallel, BF16 if options.bf16 else FP32, len(decoder_layers(model))
    tokens = sequences_per_micro_batch(options) * math.ceil(options.block_size / group) * group
    hidden = width * tokens * model.config.hidden_size
    again = options.gradient_checkpointing * layers
    gathers = 4 * layers + 4 + 2 * again
    scatters = 4 * layers + 2 + (2 if options.torch_compile else 1) * again
    if options.objective != "dpo" and ends_with_head(model):
        chunks = math.ceil(tokens * len(part.get_output_embeddings().weight) / CHUNK_LOGITS["cuda"])
        loss = Collectives(chunks, 2 * FP32 * group * tokens)
    else:
        loss = Collectives(1, width * tokens * model.config.vocab_size)
    both = zip(model.parameters(), part.parameters(), strict=True)
    alike = width * sum(whole.numel() for whole, of_rank in both if whole.numel() == of_rank.numel())
    of_micro_step = {
        "all_gather": Collectives(gathers + loss.calls, gathers * hidden + loss.size),
        "reduce_scatter": Collectives(scatters, scatters * hidden),
        "all_reduce": Collectives(layers + 1, alike),
    }
    return _sum(*[of_micro_step] * options.gradient_accumulation_steps)


def context_parallel_collectives(model: PreTrainedModel, options: Options) -> dict[str, Collectives]:
    """What ranks that divide each row (model/context_parallel.py) exchange in attention: all-to-alls.

    In each micro-step four a layer, two in its forward and two in its backward: of all heads of queries, keys and
    values at a rank's positions, in the width of computing, and of what attention gives. With gradient checkpointing,
    a layer's second forward repeats both.
    """
    heads, width = attention_heads(model.config), BF16 if options.bf16 else FP32
    tokens = sequences_per_micro_batch(options) * (of_local_sequence(options).block_size or 0)
    of_head = width * tokens * heads.entries
    there, back = (
        of_head * (heads.queries + 2 * math.lcm(heads.keys, options.context_parallel)),
        of_head * heads.queries,
    )
    calls = options.gradient_accumulation_steps * len(decoder_layers(model))
    again = options.gradient_checkpointing
    return {"all_to_all": Collectives(calls * (4 + 2 * again), calls * (2 + again) * (there + back))}


def _sum(*exchanges: dict[str, Collectives]) -> dict[str, Collectives]:
    """Of the same kind, one after the other."""
    calls: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    for exchange in exchanges:
        for kind, one in exchange.items():
            calls[kind] += one.calls
            size[kind] += one.size
    return {kind: Collectives(calls[kind], size[kind]) for kind in calls}


def buckets(parameters: Iterable[Tensor]) -> list[int]:
    """Bytes of DDP's buckets: parameters from the last to the first, as their gradients come."""
    sizes, limit = [0], FIRST_BUCKET
    for parameter in reversed(list(parameters)):
        if sizes[-1] >= limit:
            sizes.append(0)
            limit = BUCKET
        sizes[-1] += FP32 * parameter.numel()
    return sizes
