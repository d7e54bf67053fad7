"""The arithmetic of a run: ranks, micro-batches, global batches and steps."""

import dataclasses
import math

from config.errors import OptionError
from config.options import EPOCH, INTERVALS, Options
from config.schedule import check_schedule_steps
from config.validation import check_intervals


def mixture_weights(value: str) -> dict[str, float]:
    """The weight of each source in --train_mixture, normalized to a sum of 1. Raises OptionError."""
    weights: dict[str, float] = {}
    for source in value.split(","):
        name, _, weight = source.rpartition("=")
        try:
            weights[name] = float(weight)
            wrong = not name or not 0 < weights[name] < math.inf
        except ValueError:
            wrong = True
        if wrong:
            raise OptionError(
                f"train_mixture {source}: pass NAME=WEIGHT with a weight above 0, as in a.jsonl=0.7,b.jsonl=0.3"
            )
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def mesh_shape(options: Options, world_size: int) -> tuple[int, int, int]:
    """The ranks as a grid: replicas of the model, ranks that shard each replica, ranks that split each layer."""
    replicas = world_size if options.strategy == "ddp" else options.replicas
    return replicas, world_size // replicas // options.tensor_parallel, options.tensor_parallel


def data_parallel_rank_and_size(options: Options, rank: int, world_size: int) -> tuple[int, int]:
    """The data-parallel rank of `rank`, and the data-parallel size.

    Data-parallel rank r of N reads every N-th sequence from the r-th. Ranks that split each layer or each sequence read
    the same sequences, so they share one data-parallel rank.
    """
    return rank // options.model_parallel_size, world_size // options.model_parallel_size


def data_parallel_groups(options: Options, number: int) -> str:
    """The data-parallel size `number` in words: so many ranks, or groups of ranks that split each layer or sequence."""
    if options.model_parallel_size == 1:
        return count(number, "rank")
    return f"{count(number, 'group')} of {options.model_parallel_size} ranks"


def count(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: "1 rank", "2 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def derive_accumulation(options: Options, data_parallel_size: int) -> None:
    """Set the accumulation that gives `global_batch_size` sequences. Raises OptionError if it is no whole number."""
    assert options.global_batch_size
    micro_batch = options.per_device_train_batch_size
    sequences = micro_batch * data_parallel_size  # in a micro-step of all ranks
    accumulation, rest = divmod(options.global_batch_size, sequences)
    if rest or not accumulation:
        raise OptionError(
            f"global_batch_size {options.global_batch_size}: not a multiple of per_device_train_batch_size "
            f"{micro_batch} x {data_parallel_groups(options, data_parallel_size)} = {sequences} sequences; "
            f"{options.global_batch_size} / {sequences} = {options.global_batch_size / sequences:.3g} micro-steps\n"
            "change global_batch_size, per_device_train_batch_size or the number of ranks"
        )
    options.gradient_accumulation_steps = accumulation


def learning_rate_factor(options: Options, global_batch_size: int) -> float:
    """The factor of the learning rate, if it is meant for `reference_batch_size` and not for `global_batch_size`.

    In proportion to the batch (Goyal et al. 2017), or to its root, as the noise of a gradient falls (Malladi et al.
    2022, for Adam). Without `scale_learning_rate`, 1.
    """
    ratio = global_batch_size / (options.reference_batch_size or global_batch_size)
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[options.scale_learning_rate]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: sequences, micro-batches and steps."""

    block_size: int  # tokens in a sequence
    accumulation: int  # micro-batches of one rank in a step
    global_batch_size: int  # sequences of all ranks in a step
    steps_per_epoch: int  # full global batches in the training sequences; 0 for a stream, whose length is not known
    total_steps: int


def plan_run(options: Options, sequences: int, world_size: int) -> Plan:
    """The plan for so many training sequences. Sets the intervals of `options` that are fractions or epochs to steps.

    Raises OptionError if they do not fill one global batch, if the schedule does not fit into the steps, or if
    checkpoints to choose from are not evaluated.
    """
    assert options.block_size
    data_parallel_size = world_size // options.model_parallel_size
    micro_batch, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    global_batch_size = micro_batch * accumulation * data_parallel_size
    if options.streaming:
        _set_intervals(options, 0, options.max_steps)
        check_intervals(options)
        check_schedule_steps(options, options.max_steps)
        return Plan(options.block_size, accumulation, global_batch_size, 0, options.max_steps)
    steps_per_epoch = sequences // global_batch_size
    if steps_per_epoch == 0 and not options.evaluates_only:
        raise OptionError(
            f"global batch of {global_batch_size} sequences = per_device_train_batch_size {micro_batch} x "
            f"accumulation {accumulation} x {data_parallel_groups(options, data_parallel_size)}: the training data is "
            f"{sequences} sequences of block_size {options.block_size}\npass more text, or a smaller batch"
        )
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * steps_per_epoch)
    _set_intervals(options, steps_per_epoch, steps)
    if steps:
        check_intervals(options)
        check_schedule_steps(options, steps)
    return Plan(options.block_size, accumulation, global_batch_size, steps_per_epoch, steps)


def _set_intervals(options: Options, steps_per_epoch: int, total_steps: int) -> None:
    """Set each interval to a number of steps: that of an epoch, or a fraction of all, rounded up as in transformers."""
    for name in INTERVALS:
        steps = getattr(options, name)
        if steps == EPOCH:
            setattr(options, name, steps_per_epoch)
        elif 0 < steps < 1:
            setattr(options, name, math.ceil(steps * total_steps))
