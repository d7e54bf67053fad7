"""What a rank exchanges with others in one optimizer step: how many collectives of each kind, and how many bytes.

The bytes of a collective are those of the whole tensor: what is gathered, reduced or broadcast, not what a link carries
of it (compare/scaling.py has that). N is the number of parameters, L of decoder layers, W of ranks that share shards,
k of micro-steps; `docs/scaling.md` has the same as a table.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from config import Options
from model.layers import layers_of, matrices_of
from model.memory import BF16, FP32, numel

# DDP's own defaults (torch.nn.parallel.DistributedDataParallel): gradients travel as soon as so many bytes are there.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
INT64 = 8


class Collectives(NamedTuple):
    """Those of one kind."""

    calls: int
    size: int  # bytes, of all of them


def exchanged(model: PreTrainedModel, options: Options, ranks: int) -> dict[str, Collectives]:
    """The collectives of a step, by kind, for `model` on the meta device. Nothing is there that does not happen.

    Those of a divided layer (--tensor_parallel) are not among them.

    In any stage: one all-reduce of four integers, the counts of the global batch.

    DDP: all gradients, once, in buckets: all-reduce of 4 N bytes. With a sharded optimizer, each rank then broadcasts
    the part that it has updated: W broadcasts of 4 N bytes together.

    Muon, where ranks share rows: for every W matrices two all-to-alls, in the width of computing, of the matrix that a
    rank gets whole, or, where these are more, of its rows of all W. What rank 0 exchanges is counted.

    FSDP, for each of L + 1 units (a layer; the root): in each micro-step, all-gathers of its parameters, in bf16 or
    fp32, one for the forward, and, unless they are kept until then, one more for the backward; the root's are always
    kept. In the last micro-step, or in each with sync_each_batch, one reduce-scatter of its gradients, in reduce_dtype,
    and, with replicas, one all-reduce of the shard that this gives. Once, a sum of squares, for the norm. Rows are
    filled up to a multiple of W.
    """
    kinds: dict[str, list[int]] = {"all_reduce": [4 * INT64], "broadcast": [], "all_gather": [], "reduce_scatter": []}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shards, width = ranks // options.replicas, BF16 if options.bf16 else FP32
    if options.optim == "muon" and shards > 1 and (options.strategy == "fsdp" or options.shard_optimizer):
        matrices = sorted(matrices_of(model).values(), key=lambda matrix: -matrix.numel())
        batches = [matrices[first : first + shards] for first in range(0, len(matrices), shards)]
        kinds["all_to_all"] = [width * max(numel(batch[:1]), numel(batch, shards)) for batch in batches for _ in "12"]
    if options.strategy == "ddp":
        if ranks > 1:
            kinds["all_reduce"] += buckets(parameters)
        if options.shard_optimizer:
            kinds["broadcast"] += [FP32 * numel(parameters) // ranks] * ranks  # as if rows could always be divided
        return {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in kinds.items() if sizes}

    reduced = FP32 if options.reduce_dtype == "float32" else BF16
    reductions = options.gradient_accumulation_steps if options.sync_each_batch else 1
    layers = layers_of(model)
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    root = [parameter for parameter in parameters if id(parameter) not in in_layers]
    for unit, gathers in [(root, 1), *((layer.parameters(), 1 + options.reshard_after_forward) for layer in layers)]:
        whole = numel(unit, shards) * shards
        kinds["all_gather"] += [width * whole] * gathers * options.gradient_accumulation_steps
        kinds["reduce_scatter"] += [reduced * whole] * reductions
        if options.replicas > 1:
            kinds["all_reduce"] += [reduced * whole // shards] * reductions
    kinds["all_reduce"] += [FP32]
    return {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in kinds.items() if sizes}


def buckets(parameters: Iterable[Tensor]) -> list[int]:
    """Bytes of DDP's buckets: parameters from the last to the first, as their gradients come."""
    sizes, limit = [0], FIRST_BUCKET
    for parameter in reversed(list(parameters)):
        if sizes[-1] >= limit:
            sizes.append(0)
            limit = BUCKET
        sizes[-1] += FP32 * parameter.numel()
    return sizes
