"""The start block: what is about to run, in lines for people."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.options import Options
from config.plan import Plan, data_parallel_groups, learning_rate_factor
from data.prepare import Data, describe_data, show_examples, tokens_per_sequence
from estimate.stages import memory_forecast, stage_name
from metrics.hardware import gpu_memory
from model.layers import decoder_layers, decoder_matrices
from model.weights import Weights


def dtype_names(tensors: Iterable[Any]) -> str:
    """The dtypes that occur among tensors, on the disk or in memory."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def describe_run(
    options: Options,
    plan: Plan,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    weights: Weights,
    device: torch.device,
    resumed_from: Path | None,
) -> str:
    """A description of the run for people. `model` is on the meta device, before it is wrapped.

    Costs a second or three for the memory forecast. With `show_examples`, the first training sequences follow.
    """
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    files = dtype_names(stored for source in weights.values() for part in source.stored.values() for stored in part)
    masters = dtype_names(model.parameters())  # gradients and moments follow the dtype of their parameter
    compute = "bfloat16" if options.bf16 else masters
    compute += ", what layers are given, too" * options.bf16_residual
    compute += ", matrix products of layers float8" * options.float8 + ", layers compiled" * options.torch_compile
    epoch = f"{plan.steps_per_epoch:,}" if plan.steps_per_epoch else "an unknown number"
    tokens = plan.global_batch_size * tokens_per_sequence(data, plan.block_size)
    micro_batch = options.per_device_train_batch_size
    lines = {
        "ranks": f"{ranks} on {name}, backend {dist.get_backend()}",
        "strategy": strategy_line(model, options, ranks),
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "weights": f"{files} in the files of {options.model_name_or_path}" if weights else "random",
        "dtypes": f"parameters {masters}, gradients {masters}, optimizer state {masters}; compute {compute}",
        "activations": activations_line(options),
        "memory": memory_forecast(model, options, ranks, gpu_memory(device)),
        **describe_data(data, plan.block_size),
        "objective": f"dpo, held to the model as it begins with beta {options.dpo_beta}"
        if options.objective == "dpo"
        else "next token",
        "global batch": f"{micro_batch} rows x {plan.accumulation} micro-steps x "
        f"{data_parallel_groups(options, ranks // options.model_parallel_size)} = "
        f"{plan.global_batch_size} rows, up to {tokens:,} tokens",
        "optimizer": optimizer_line(model, options),
        "learning rate": learning_rate_line(options, plan.global_batch_size),
        "steps": f"{plan.total_steps:,}, {epoch} an epoch, up to {plan.total_steps * tokens:,} tokens",
        "output": str(options.output_dir),
        "start": f"resumed from {resumed_from}" if resumed_from else "from the beginning",
    }
    block = "\n".join(f"{key:<13} {value}" for key, value in lines.items())
    if options.show_examples:
        block += "\n" + show_examples(data.train, options.show_examples, tokenizer)
    return block


def strategy_line(model: PreTrainedModel, options: Options, ranks: int) -> str:
    """What each rank holds, and whether FSDP gathers layer by layer."""
    line = f"{stage_name(options)}: {sharded(options, ranks)}"
    if options.strategy == "ddp" or decoder_layers(model):
        return line
    return f"{line}; the whole model is one unit, because no decoder layers are found in {type(model).__name__}"


def sharded(options: Options, ranks: int) -> str:
    """What each rank has a part of, and what it has whole."""
    more = [f"each row divided among {options.context_parallel} of them"] if options.context_parallel > 1 else []
    if options.strategy == "ddp":
        moments = f"moments sharded over {ranks} ranks; " if options.shard_optimizer else ""
        return ", ".join([f"{moments}each rank holds parameters{'' if moments else ', moments'} and gradients", *more])
    if not options.reshard_after_forward:
        more.append("parameters whole until gradients are exchanged")
    if options.gradient_accumulation_steps > 1 and not options.sync_each_batch:
        more.append("gradients whole between micro-steps")
    if options.tensor_parallel > 1:
        more.append(f"each layer divided among {options.tensor_parallel} of them")
    if options.cpu_offload:
        more.append("shards and optimizer in host memory")
    shards = f"parameters, gradients and moments sharded over {ranks // options.replicas} ranks"
    return ", ".join([shards, *more])


def activations_line(options: Options) -> str:
    """What the layers keep of a forward for its backward."""
    if options.gradient_checkpointing:
        where = ", in host memory" if options.offload_activations else ""
        return f"only the input of each layer{where}; the rest is computed again"
    if options.activation_memory_budget is not None:
        return f"{options.activation_memory_budget:.0%} of each layer's; the rest is computed again"
    return "kept"


def optimizer_line(model: PreTrainedModel, options: Options) -> str:
    """Which parameters are updated how."""
    if options.optim != "muon":
        return "AdamW"
    elements = sum(matrix.numel() for matrix in decoder_matrices(model).values())
    return f"Muon for {elements:,} parameters in matrices of the decoder layers, AdamW for all others"


def learning_rate_line(options: Options, rows: int) -> str:
    """The highest rate, and how it follows from the one that was given, for a global batch of `rows`."""
    if options.scale_learning_rate == "none":
        return f"{options.learning_rate:g}, whatever the global batch"
    given = options.learning_rate / learning_rate_factor(options, rows)
    ratio = f"{rows} / {options.reference_batch_size} rows"
    return f"{options.learning_rate:g} = {given:g} x {'sqrt' if options.scale_learning_rate == 'sqrt' else ''}({ratio})"
