"""The arithmetic of a run: ranks, micro-batches, global batches and steps."""

import dataclasses
import math

from config.errors import OptionError
from config.options import Options


def mixture_weights(value: str) -> dict[str, float]:
    """The weight of each source that --train_mixture names, divided by their sum. Raises OptionError."""
    weights: dict[str, float] = {}
    for part in value.split(","):
        name, _, weight = part.rpartition("=")
        try:
            weights[name] = float(weight)
            wrong = not name or not 0 < weights[name] < math.inf
        except ValueError:
            wrong = True
        if wrong:
            raise OptionError(
                f"train_mixture {part}: pass NAME=WEIGHT with a weight above 0, as in a.jsonl=0.7,b.jsonl=0.3"
            )
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def mesh_shape(options: Options, world_size: int) -> tuple[int, int, int]:
    """The ranks as a grid: replicas of the model x ranks that shard each of them x ranks that divide each layer."""
    replicas = world_size if options.strategy == "ddp" else options.replicas
    return replicas, world_size // replicas // options.tensor_parallel, options.tensor_parallel


def data_parallel_rank_and_size(options: Options, rank: int, world_size: int) -> tuple[int, int]:
    """Which part of the sequences `rank` reads, and of how many parts.

    Ranks that split each layer or each sequence among themselves read the same sequences: they count as one.
    """
    return rank // options.model_parallel_size, world_size // options.model_parallel_size


def data_parallel_groups(options: Options, number: int) -> str:
    """Those who read rows of their own, in words: ranks, or groups of ranks that divide each layer or row."""
    if options.model_parallel_size == 1:
        return f"{number} ranks"
    return f"{number} group{'' if number == 1 else 's'} of {options.model_parallel_size} ranks"


def derive_accumulation(options: Options, world_size: int) -> None:
    """Set the accumulation that gives `global_batch_size` rows; an OptionError shows an impossible division.

    `world_size` is the number of those that read rows of their own: see `readers`.
    """
    assert options.global_batch_size
    micro_batch = options.per_device_train_batch_size
    accumulation, rest = divmod(options.global_batch_size, micro_batch * world_size)
    if rest or not accumulation:
        raise OptionError(
            f"global_batch_size {options.global_batch_size}: not a multiple of per_device_train_batch_size "
            f"{micro_batch} x {data_parallel_groups(options, world_size)} = {micro_batch * world_size} rows; "
            f"{options.global_batch_size} / {micro_batch * world_size} = "
            f"{options.global_batch_size / (micro_batch * world_size):.3g} micro-steps\n"
            "change global_batch_size, per_device_train_batch_size or the number of ranks"
        )
    options.gradient_accumulation_steps = accumulation


def learning_rate_factor(options: Options, rows: int) -> float:
    """What the learning rate is multiplied by for a global batch of `rows`, where it is meant for another.

    In proportion to the batch (Goyal et al. 2017), or to its root, as the noise of a gradient falls (Malladi et al.
    2022, for Adam). Without `scale_learning_rate`, 1.
    """
    ratio = rows / (options.reference_batch_size or rows)
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[options.scale_learning_rate]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: how many rows, micro-batches and steps."""

    block_size: int  # tokens in a row
    accumulation: int  # micro-batches of one rank in a step
    global_batch_size: int  # rows of all ranks in a step
    steps_per_epoch: int  # whole global batches among the training rows; 0: not known of a stream
    total_steps: int


def plan_run(options: Options, rows: int, world_size: int) -> Plan:
    """The plan for `rows` training rows. Raises OptionError if they do not fill one global batch."""
    assert options.block_size
    world_size //= options.model_parallel_size
    accumulation = options.gradient_accumulation_steps
    global_batch_size = options.per_device_train_batch_size * accumulation * world_size
    if options.streaming:
        return Plan(options.block_size, accumulation, global_batch_size, 0, options.max_steps)
    steps_per_epoch = rows // global_batch_size
    if steps_per_epoch == 0:
        raise OptionError(
            f"global batch of {global_batch_size} rows = per_device_train_batch_size "
            f"{options.per_device_train_batch_size} x {accumulation} micro-steps x {data_parallel_groups(options, world_size)}: the "
            f"training split has only {rows} rows of block_size {options.block_size}\n"
            "pass more text, or a smaller batch"
        )
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * steps_per_epoch)
    return Plan(options.block_size, accumulation, global_batch_size, steps_per_epoch, steps)
