"""A table of the memory that each stage needs: python -m estimate --model_name_or_path DIR --ranks 8."""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import transformers
from transformers import PreTrainedModel

from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.plan import count
from estimate.activations import Activations, count_activations
from estimate.memory import GIB, RESERVED, gib, numel, predict
from estimate.stages import memory_forecast, stage_name, stages
from model.build import build_model, load_config_and_tokenizer

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


def table(model: PreTrainedModel, options: Options, ranks: int, capacity: float) -> str:
    """GiB of a rank for each stage and micro-batch, in brackets if a GPU of `capacity` bytes has no room for it."""

    def counts(options: Options) -> Callable[[int], Activations]:
        """The activations of any micro-batch, from the counts for two and four sequences: they grow linearly."""
        two, four = (
            dataclasses.astuple(
                count_activations(model, dataclasses.replace(options, per_device_train_batch_size=size))
            )
            for size in (2, 4)
        )
        return lambda size: Activations(*(round(a + (b - a) * (size - 2) / 2) for a, b in zip(two, four, strict=True)))

    lines = ["| micro-batch | " + " | ".join(map(str, MICRO_BATCHES)) + " |", "|---" * (len(MICRO_BATCHES) + 1) + "|"]
    unknown: dict[str, None] = {}
    for stage in stages(options, ranks):
        cells = []
        try:
            saved = counts(stage)
            for size in MICRO_BATCHES:
                batch = dataclasses.replace(stage, per_device_train_batch_size=size)
                memory = predict(model, batch, ranks, saved(size))
                cells.append(gib(memory.total) if memory.fits(capacity) else f"({gib(memory.total)})")
        except OptionError as error:
            unknown[str(error)] = None  # each reason once
            cells = ["?"] * len(MICRO_BATCHES)
        lines.append(f"| {stage_name(stage)} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"? {reason}" for reason in unknown)])


def main(argv: list[str]) -> None:
    """Print the table for the model and options that `argv` names. Raises OptionError."""
    parser = argparse.ArgumentParser(
        prog="python -m estimate",
        description="Print the memory of each stage, for the model and options of a run.",
        epilog="All options of train.py are taken, too: `python train.py --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="number of ranks of the run [1]")
    parser.add_argument("--gpu_memory", type=float, default=80.0, metavar="GIB", help="memory of a GPU, in GiB [80]")
    arguments, rest = parser.parse_known_args(argv)
    for name in ("ranks", "gpu_memory"):
        if getattr(arguments, name) <= 0:
            raise OptionError(f"{name} {getattr(arguments, name)}: must be more than 0")
    transformers.utils.logging.set_verbosity_error()
    there = parse(rest, arguments.ranks, bf16=True, torch_compile=True)  # as on a GPU, which may be absent here
    # The check must not require a compiler here.
    options = dataclasses.replace(there, torch_compile=False, activation_memory_budget=None)
    check(options, arguments.ranks)
    options.torch_compile, options.activation_memory_budget = there.torch_compile, there.activation_memory_budget
    model = build_model(options, load_config_and_tokenizer(options)[0])
    compiled = ", layers compiled" if options.torch_compile else ""
    checkpointing = ", gradient checkpointing" if options.gradient_checkpointing else ""
    compute = f"{'bfloat16' if options.bf16 else 'float32'}{compiled}{checkpointing}"
    print(
        f"{type(model).__name__}, {numel(model.parameters()):,} parameters, {count(arguments.ranks, 'rank')}, "
        f"sequences of {options.block_size} tokens, compute {compute}\n"
        f"GiB of a rank; (in brackets: beyond a GPU of {arguments.gpu_memory:g} GiB, of which "
        f"{gib(RESERVED)} are not for tensors)\n"
    )
    print(table(model, options, arguments.ranks, arguments.gpu_memory * GIB))
    asked_for = f"{stage_name(options)}, micro-batch {options.per_device_train_batch_size}"
    print(f"\n{asked_for}: {memory_forecast(model, options, arguments.ranks, None)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"estimate: error: {error}", file=sys.stderr)
        sys.exit(2)
