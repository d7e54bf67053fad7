"""Predict the memory, the bytes and the seconds of a step on 1 to 1,024 ranks, for Qwen3 shapes. Needs no GPU.

    python -m compare.scaling [--models 0.6B,8B,32B] [--ranks 1,8,64,256,1024] [--flops 5.5e14]
                              [--within_node 3e11] [--between_nodes 2e11] [--latency 5e-6] [--overlap 0.9]

Memory comes from estimate/memory.py, which compare/memory.py measures. Bytes come from estimate/communication.py, which
a test counts. Seconds come from a model, and are not measured:

    matrix         FLOPs of a rank's tokens (estimate/flops.py) / `flops`. Gradient checkpointing adds those of a second
                   forward without the head and without the last product of each layer. `flops` is the rate of a GPU in
                   a whole step, not its peak; the default is the rate of Qwen3-8B on one H200.
    communication  bytes on a rank's link / its bytes per second. In a group of g ranks, each rank sends S (g - 1) / g
                   of a tensor of S bytes to all-gather or reduce-scatter it, and twice that to all-reduce it (ring
                   algorithms: Patarasuk and Yuan 2009). A group within a node of 8 has `within_node` for each rank. A
                   ring through several nodes has the slower of that and `between_nodes`, for a whole node. Groups of
                   one rank per node, which average the shards of replicas, have an eighth of it each. Each hop of a
                   collective adds `latency`: g - 1 hops on a ring; on a tree, as an all-reduce may use, 2 log2 g
                   (Thakur et al. 2005).
    step           matrix + communication - overlap, the fraction `overlap` of the communication, at most matrix

The model leaves out other times: slower kernels than `flops` includes, nodes that wait for the slowest, evaluations and
checkpoints.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator

from transformers import PreTrainedModel, Qwen3Config

from compare.memory import LENGTH, MODELS
from config.options import Options
from estimate.communication import Collectives, predict_collectives
from estimate.flops import flops_per_token
from estimate.memory import GIB, numel, predict
from estimate.stages import stage_name
from model.build import build_model

NODE = 8  # ranks
MICRO_BATCH = {"0.6B": 8, "1.7B": 4, "8B": 2, "32B": 1}  # of a micro-batch
CHECKPOINTED = ("8B", "32B")


@dataclasses.dataclass(frozen=True)
class Machine:
    """FLOP/s of a GPU, bytes per second of a rank's link in its node and of a node's link, seconds of a hop."""

    flops: float
    within_node: float
    between_nodes: float
    latency: float
    overlap: float  # the fraction of the communication that computation can hide


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="0.6B,8B,32B")
    parser.add_argument("--ranks", default="1,8,64,256,1024")
    rates = {"flops": 5.5e14, "within_node": 3e11, "between_nodes": 2e11, "latency": 5e-6, "overlap": 0.9}
    for name, default in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    arguments = vars(parser.parse_args())
    if unknown := set(arguments["models"].split(",")) - MODELS.keys():
        parser.error(f"--models {min(unknown)}: pass some of {','.join(MODELS)}")
    if not all(ranks.isdecimal() and int(ranks) for ranks in arguments["ranks"].split(",")):
        parser.error(f"--ranks {arguments['ranks']}: pass numbers of at least 1, as in 8,64")
    machine = Machine(**{name: arguments[name] for name in rates})
    print(
        ", ".join(f"{name} {arguments[name]:g}" for name in rates) + f"; sequences of {LENGTH} tokens, bf16, compiled"
    )
    for name in arguments["models"].split(","):
        checkpointing = name in CHECKPOINTED
        options = Options(
            per_device_train_batch_size=MICRO_BATCH[name],
            block_size=LENGTH,
            bf16=True,
            torch_compile=True,
            gradient_checkpointing=checkpointing,
        )
        model = build_model(options, Qwen3Config(**MODELS[name]))
        of_token = flops_per_token(model, LENGTH) or 0.0
        if checkpointing:
            left_out = [module for name, module in model.named_modules() if name.endswith(("lm_head", "down_proj"))]
            of_token += of_token / 3 - 2 * sum(numel(module.parameters()) for module in left_out)
        flops = of_token * MICRO_BATCH[name] * LENGTH
        print(f"\n{name}, micro-batch {MICRO_BATCH[name]}{', gradient checkpointing' if checkpointing else ''}\n")
        sizes = "| | ranks | GiB a rank | GB communicated | on a rank's link"
        print(f"{sizes} | matrix s | communication s | step s | tokens/s |")
        print("|---" * 9 + "|")
        for ranks in map(int, arguments["ranks"].split(",")):
            for stage in compared(options, ranks):
                print(row(model, stage, ranks, flops, machine))


def compared(options: Options, ranks: int) -> Iterator[Options]:
    """DDP, FSDP over all ranks, and FSDP within each node."""
    yield dataclasses.replace(options, strategy="ddp")
    yield dataclasses.replace(options, strategy="fsdp")
    if ranks > NODE and ranks % NODE == 0:
        yield dataclasses.replace(options, strategy="fsdp", replicas=ranks // NODE)


def row(model: PreTrainedModel, options: Options, ranks: int, flops: float, machine: Machine) -> str:
    """A line of the table; tokens per second are those of all ranks."""
    collectives = predict_collectives(model, options, ranks)
    sent = {kind: traffic(kind, one, options, ranks) for kind, one in collectives.items()}
    matrix = flops / machine.flops
    communication = sum(size / link(kind, options, ranks, machine) for kind, size in sent.items())
    communication += sum(one.calls * hops(kind, options, ranks) for kind, one in collectives.items()) * machine.latency
    step = matrix + communication - min(machine.overlap * communication, matrix)
    tokens = options.per_device_train_batch_size * (options.block_size or 0) * ranks
    cells = [
        stage_name(options),
        f"{ranks:,}",
        f"{predict(model, options, ranks).total / GIB:.1f}",
        f"{sum(one.size for one in collectives.values()) / 1e9:.2f}",
        f"{sum(sent.values()) / 1e9:.2f}",
        f"{matrix:.3f}",
        f"{communication:.3f}",
        f"{step:.3f}",
        f"{tokens / step:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def group_size(kind: str, options: Options, ranks: int) -> int:
    """Ranks that take part in such a collective, by far the most bytes of which are parameters or gradients."""
    if options.strategy == "ddp" or options.replicas == 1:
        return ranks
    return options.replicas if kind == "all_reduce" else ranks // options.replicas


def traffic(kind: str, collectives: Collectives, options: Options, ranks: int) -> float:
    """Bytes that a rank sends."""
    group = group_size(kind, options, ranks)
    others = (group - 1) / group
    return collectives.size * (2 * others if kind == "all_reduce" else others)


def hops(kind: str, options: Options, ranks: int) -> float:
    """Links that the bytes of one collective cross one after another."""
    group = group_size(kind, options, ranks)
    return 2 * math.log2(group) if kind == "all_reduce" else group - 1


def link(kind: str, options: Options, ranks: int, machine: Machine) -> float:
    """Bytes per second that a rank sends with."""
    if kind == "all_reduce" and options.strategy == "fsdp" and options.replicas > 1:
        return min(machine.within_node, machine.between_nodes / min(NODE, ranks // options.replicas))
    if group_size(kind, options, ranks) <= NODE:
        return machine.within_node
    return min(machine.within_node, machine.between_nodes)


if __name__ == "__main__":
    main()
