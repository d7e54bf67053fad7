"""The checks of options: what cannot work is refused before anything is started."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch

from config.errors import OptionError
from config.options import SCHEDULE_PARAMETERS, Options
from config.plan import data_parallel_groups, derive_accumulation, learning_rate_factor, mixture_weights

POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "reference_batch_size",
    "replicas",
    "tensor_parallel",
    "context_parallel",
    "save_total_limit",
    "logging_steps",
    "ddp_timeout",
    "dataloader_prefetch_factor",
)

NOT_NEGATIVE = (
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "max_skipped_steps",
    "show_examples",
    "trace_steps",
    "dataloader_num_workers",
    "eval_steps",
    "save_steps",
)


def check(options: Options, world_size: int) -> None:
    """Refuse what cannot work, derive `gradient_accumulation_steps` from `global_batch_size`, scale `learning_rate`.

    Costs nothing and needs no process group. Raises OptionError.
    """
    for name in POSITIVE:
        _at_least(options, name, 1)
    for name in NOT_NEGATIVE:
        _at_least(options, name, 0)
    check_data(options)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(options, name) < 1:
            raise OptionError(f"{name} {getattr(options, name)}: must be at least 0 and below 1")
    if options.lr_scheduler_type == "constant" and options.warmup_steps:
        raise OptionError(
            f"warmup_steps {options.warmup_steps:g}: --lr_scheduler_type constant has no warmup\n"
            "pass --lr_scheduler_type constant_with_warmup, or remove --warmup_steps"
        )
    if options.lr_scheduler_kwargs is not None:
        _check_schedule(options, options.lr_scheduler_kwargs)
    if options.max_steps <= 0 and options.num_train_epochs <= 0:
        raise OptionError(f"num_train_epochs {options.num_train_epochs}: pass more than 0, or max_steps")
    if options.model_name_or_path and options.config_name:
        raise OptionError("model_name_or_path and config_name: pass one; config_name means random weights")
    model = options.model_name_or_path or options.config_name
    if model and Path(model).resolve() == Path(options.output_dir).resolve():
        raise OptionError(f"output_dir {options.output_dir}: it is the model's own directory; pass another one")
    _check_strategy(options, world_size)
    if options.bf16_residual and not options.bf16:
        raise OptionError("bf16_residual true: it needs --bf16 true")
    if options.float8 and (options.tensor_parallel > 1 or not options.bf16):
        needs = "is for whole layers; leave out one of it and tensor_parallel" if options.bf16 else "needs --bf16 true"
        raise OptionError(f"float8 true: it {needs}")
    world_size //= options.model_parallel_size  # from here on, what reads rows of its own: a group of ranks, or one
    if options.objective == "dpo" and options.packing:
        raise OptionError(f"packing {options.packing}: with --objective dpo, a row is a pair; leave it out")
    if not options.dpo_beta > 0:
        raise OptionError(
            f"dpo_beta {options.dpo_beta}: pass more than 0; 0.1 is usual, and more keeps the model nearer"
        )
    if options.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise OptionError("report_to tensorboard: it is not installed here; pip install tensorboard, or pass none")
    local_ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < local_ranks and options.ddp_backend != "gloo":
        raise OptionError(
            f"--nproc_per_node {local_ranks}: this host has {gpus} GPUs\ngive at most that many, or let ranks share a "
            "GPU with --ddp_backend gloo"
        )
    if options.ddp_backend == "nccl" and not torch.cuda.is_available():
        raise OptionError("ddp_backend nccl: there is no GPU here; pass gloo, or leave it out")
    missing = _missing_for_compilation() if options.torch_compile else None
    if missing:
        options.torch_compile = False
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"torch_compile: off, because {missing} is not here; it trains, at half the speed", file=sys.stderr)
    if options.activation_memory_budget is not None:
        _check_memory_budget(options, options.activation_memory_budget)
    if options.global_batch_size:
        derive_accumulation(options, world_size)
    if (options.scale_learning_rate == "none") != (options.reference_batch_size is None):
        raise OptionError(
            f"scale_learning_rate {options.scale_learning_rate}, reference_batch_size {options.reference_batch_size}: "
            "pass both or neither"
        )
    rows = options.per_device_train_batch_size * options.gradient_accumulation_steps * world_size
    options.learning_rate *= learning_rate_factor(options, rows)


def _check_strategy(options: Options, world_size: int) -> None:
    """Refuse what the strategies cannot do, or cannot do together."""
    if world_size % options.context_parallel:
        raise OptionError(
            f"context_parallel {options.context_parallel}: {world_size} ranks are "
            f"{world_size / options.context_parallel:.3g} groups of {options.context_parallel}\ngive a divisor of the "
            "number of ranks"
        )
    if options.context_parallel > 1 and (options.tensor_parallel > 1 or options.objective == "dpo"):
        name = f"tensor_parallel {options.tensor_parallel}" if options.tensor_parallel > 1 else "objective dpo"
        raise OptionError(f"context_parallel {options.context_parallel}: cannot be combined with {name}; leave out one")
    for name in ("tensor_parallel", "replicas"):
        if getattr(options, name) > 1 and options.strategy != "fsdp":
            raise OptionError(
                f"{name} {getattr(options, name)}: needs --strategy fsdp, in a DeepSpeed file zero_optimization.stage "
                "2 or 3\ngive that, or leave it out"
            )
    if world_size % options.tensor_parallel:
        raise OptionError(
            f"tensor_parallel {options.tensor_parallel}: {world_size} ranks are "
            f"{world_size / options.tensor_parallel:.3g} groups of {options.tensor_parallel}\ngive a divisor of the "
            "number of ranks"
        )
    if options.tensor_parallel > 1 and options.ddp_backend == "gloo" and torch.cuda.is_available():
        raise OptionError(
            f"tensor_parallel {options.tensor_parallel}: with --ddp_backend gloo, GPU tensors cannot be gathered "
            "within a layer\nleave ddp_backend out; each rank then needs a GPU of its own"
        )
    if options.tensor_parallel > 1 and options.offload_activations:
        raise OptionError(
            f"offload_activations true: cannot be combined with tensor_parallel {options.tensor_parallel}; leave it out"
        )
    if options.optim == "muon" and (options.tensor_parallel > 1 or options.cpu_offload):
        name = f"tensor_parallel {options.tensor_parallel}" if options.tensor_parallel > 1 else "cpu_offload true"
        raise OptionError(
            f"optim muon: not with {name}: it needs each matrix whole, on a GPU\n"
            "leave that out, or pass --optim adamw_torch_fused"
        )
    world_size //= options.tensor_parallel
    if world_size % options.replicas:
        sharing = data_parallel_groups(dataclasses.replace(options, context_parallel=1), world_size)
        raise OptionError(
            f"replicas {options.replicas}: {sharing} are "
            f"{world_size / options.replicas:.3g} for each replica\ngive a divisor of their number"
        )
    if options.shard_optimizer and options.strategy != "ddp":
        raise OptionError("shard_optimizer true: fsdp shards the optimizer in any case; leave it out")
    if options.cpu_offload and options.strategy != "fsdp":
        raise OptionError(
            "cpu_offload true: ddp keeps all of the model on the GPU; pass --strategy fsdp, or leave it out"
        )
    if not options.reshard_after_forward and options.strategy != "fsdp":
        raise OptionError(
            "reshard_after_forward false: ddp shards no parameters; pass --strategy fsdp, or leave it out"
        )
    if options.sync_each_batch and options.strategy != "fsdp":
        raise OptionError("sync_each_batch true: ddp keeps whole gradients in any case; leave it out")
    if options.reduce_dtype != "float32" and options.strategy != "fsdp":
        raise OptionError(f"reduce_dtype {options.reduce_dtype}: ddp reduces in fp32; pass --strategy fsdp")
    if options.offload_activations and not options.gradient_checkpointing:
        raise OptionError("offload_activations true: it is the inputs that --gradient_checkpointing keeps; pass both")


def _check_schedule(options: Options, text: str) -> None:
    known = SCHEDULE_PARAMETERS.get(options.lr_scheduler_type, ())
    try:
        parameters = json.loads(text)
        right = set(parameters) <= set(known) and parameters.pop("warmup_type", "log") in ("log", "linear")
        right = right and all(0 <= value < math.inf for value in parameters.values())
    except (ValueError, TypeError, AttributeError):
        right = False
    if not right:
        takes = f"a JSON mapping of {', '.join(known)}\nwarmup_type is log or linear, the others are numbers from 0"
        raise OptionError(
            f"lr_scheduler_kwargs {text}: --lr_scheduler_type {options.lr_scheduler_type} takes "
            f"{takes if known else 'none; leave it out'}"
        )


def _missing_for_compilation() -> str | None:
    """What torch.compile needs and this machine lacks, in words."""
    if torch.cuda.is_available() and not importlib.util.find_spec("triton"):
        return "the package triton"
    return None if any(map(shutil.which, ("cc", "gcc", "clang", "g++"))) else "a C compiler"


def _check_memory_budget(options: Options, budget: float) -> None:
    name = f"activation_memory_budget {budget}"
    if not 0 <= budget <= 1:
        raise OptionError(f"{name}: pass a share from 0 to 1")
    if not options.torch_compile:
        raise OptionError(f"{name}: the compiler chooses what is kept; pass --torch_compile, or leave it out")
    if options.gradient_checkpointing:
        raise OptionError(f"{name}: with gradient_checkpointing, only a layer's input is kept anyway; pass one of them")


def check_data(options: Options) -> None:
    """Refuse what cannot work of the options that say what the rows are. Raises OptionError."""
    _at_least(options, "block_size", 2)
    _at_least(options, "preprocessing_num_workers", 1)
    _at_least(options, "max_targetless_fraction", 0)
    if not 0 <= options.validation_split_percentage < 100:
        raise OptionError(f"validation_split_percentage {options.validation_split_percentage}: pass 0 to 99")
    sources = [name for name in ("train_file", "train_mixture", "dataset_name") if getattr(options, name)]
    if len(sources) > 1:
        raise OptionError(f"{' and '.join(sources)}: pass one")
    if options.validation_file and not {"train_file", "train_mixture"} & set(sources):
        raise OptionError(f"validation_file {options.validation_file}: needs a train_file or train_mixture beside it")
    if options.streaming and options.max_steps <= 0:
        raise OptionError("streaming true: the number of rows is not known beforehand; pass --max_steps")
    if options.streaming and sources not in (["train_file"], ["dataset_name"]):
        raise OptionError("streaming true: pass --train_file or --dataset_name; only these can be streamed")
    if options.streaming and options.objective == "dpo":
        raise OptionError("streaming true: not with --objective dpo, which needs a reference of all pairs beforehand")
    if options.train_mixture:
        mixture_weights(options.train_mixture)


def check_skipped(options: Options, step: int, skipped_in_a_row: int) -> None:
    """Raises OptionError when training does not get on any more. All ranks have counted the same."""
    if skipped_in_a_row > options.max_skipped_steps:
        raise OptionError(
            f"max_skipped_steps {options.max_skipped_steps}: up to step {step}, {skipped_in_a_row} steps in a row had "
            "no usable gradient (see loss and grad_norm in metrics.jsonl)\nresume from an earlier checkpoint with a "
            f"lower --learning_rate than {options.learning_rate}, or look for rows without targets"
        )


def _at_least(options: Options, name: str, least: float) -> None:
    value = getattr(options, name)
    if value is not None and not value >= least:  # so that NaN is refused too
        raise OptionError(f"{name} {value}: must be at least {least}")
