"""The start block: what is about to run, in lines for people."""

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint.files import MOST_JSON, STATE
from config.options import Options
from config.plan import Plan, count, data_parallel_groups, learning_rate_factor
from data.prepare import Data, describe_data, show_examples, tokens_per_sequence
from estimate.flops import count_uses
from estimate.stages import memory_forecast, stage_name
from loss.cuda_graphs import obstacle
from metrics.hardware import gpu_memory
from model.adapters import describe_adapters
from model.layers import decoder_layers, decoder_matrices, expert_stacks
from model.weights import Weights
from optim.schedule import learning_rate
from runtime.files import read_json

FLOAT8_PAYS = 2048  # hidden size: 1.15 to 1.20 times the speed of bf16 from there on, and 1.02 to 1.06 at 1024


def describe_run(
    options: Options,
    plan: Plan,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    objective: nn.Module,
    weights: Weights,
    device: torch.device,
    resumed_from: Path | None,
) -> str:
    """The start block of rank 0: lines that describe the run. `objective` is on the meta device, not wrapped yet.

    Costs a second or three for the memory forecast. With `show_examples`, the first training sequences follow.
    """
    if dist.get_rank() > 0:
        return ""
    model: PreTrainedModel = objective.model
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    files = dtype_names(stored for source in weights.values() for part in source.stored.values() for stored in part)
    stored = dtype_names(model.parameters())
    masters = dtype_names(parameter for parameter in model.parameters() if parameter.requires_grad)
    compute = "bfloat16" if options.bf16 else masters  # gradients follow the dtype of their parameter
    rounded = "bfloat16, rounded stochastically" if options.optim_state_dtype == "bfloat16" else masters
    compute += ", also between layers" * options.bf16_residual
    if options.float8:
        small = getattr(model.config.get_text_config(), "hidden_size", FLOAT8_PAYS) < FLOAT8_PAYS
        compute += ", matrix products of the layers float8" + " (hardly faster: the hidden size is small)" * small
    compute += ", layers compiled" * options.torch_compile
    compute += ", launched as CUDA graphs" * (not obstacle(options, data.packing, objective))
    epoch = f"{plan.steps_per_epoch:,}" if plan.steps_per_epoch else "an unknown number"
    tokens = plan.global_batch_size * tokens_per_sequence(data, plan.block_size)
    lines = {
        "ranks": f"{ranks} on {name}, backend {dist.get_backend()}",
        "strategy": strategy_line(model, options, ranks),
        "model": model_line(model),
        **({"adapters": describe_adapters(model, options)} if options.use_peft else {}),
        "weights": f"{files} in the files of {options.model_name_or_path}" if weights else "random",
        "dtypes": f"parameters {stored}, gradients {masters}, optimizer state {rounded}; compute {compute}",
        "activations": activations_line(options),
        "memory": memory_forecast(model, options, ranks, gpu_memory(device, shared=options.ddp_backend == "gloo")),
        **describe_data(data, plan.block_size),
        "objective": objective_line(options),
        "global batch": global_batch_line(options, plan, ranks, tokens),
        "optimizer": optimizer_line(model, options),
        "learning rate": learning_rate_line(options, plan.global_batch_size),
        "steps": f"{plan.total_steps:,}, {epoch} an epoch, up to {plan.total_steps * tokens:,} tokens"
        if plan.total_steps
        else "none: only evaluates",
        "output": str(options.output_dir),
        "start": start_line(options, plan, resumed_from),
    }
    if options.eval_steps and not data.evaluated:
        lines["validation"] = f"none, so eval_steps {options.eval_steps} has no effect"
    block = "\n".join(f"{key:<13} {value}" for key, value in lines.items())
    if options.show_examples:
        colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        block += "\n" + show_examples(data.train, options.show_examples, tokenizer, colored)
    return block


def objective_line(options: Options) -> str:
    """What a step minimizes, and where the reference of DPO comes from."""
    if options.objective == "sft":
        return "next token"
    reference = "the model without its adapters, in each step" if options.use_peft else "the initial model, cached"
    return f"dpo, beta {options.dpo_beta}, reference: {reference}"


def model_line(model: PreTrainedModel) -> str:
    """The class and its parameters; of a mixture also those that one token uses, and why MFU cannot be computed."""
    line, uses = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters", count_uses(model)
    if isinstance(uses, str):
        return f"{line}; no MFU: {uses}"
    return f"{line}; each token is multiplied with {uses.products:,.0f}" if expert_stacks(model) else line


def start_line(options: Options, plan: Plan, resumed_from: Path | None) -> str:
    """Where the run starts. After a resume, also what changes: the dtype of the moments, the learning rate."""
    if not resumed_from:
        return "from the beginning"
    state = read_json(resumed_from / STATE, MOST_JSON)
    step, was = state["progress"]["step"], state["progress"].get("learning_rate")
    if not plan.total_steps:
        return f"the model of {resumed_from}"
    facts, now = [f"resumed from {resumed_from}"], learning_rate(step, plan.total_steps, options)
    moments = state["options"].get("optim_state_dtype", "float32")
    if moments != options.optim_state_dtype:
        facts.append(f"its moments were {moments}, and are {options.optim_state_dtype} now")
    if was is not None and not math.isclose(was, now, rel_tol=1e-6):
        facts.append(f"step {step} had the learning rate {was:g}, and has {now:g} in this schedule")
    return "; ".join(facts)


def strategy_line(model: PreTrainedModel, options: Options, ranks: int) -> str:
    """The stage of sharding by name, and what each rank holds in it."""
    line = f"{stage_name(options)}: {sharded(options, ranks)}"
    if options.strategy == "ddp" or decoder_layers(model):
        return line
    return f"{line}; the full model is one unit, because no decoder layers are found in {type(model).__name__}"


def sharded(options: Options, ranks: int) -> str:
    """The state that is sharded, over how many ranks, and the state that each rank holds in full."""
    facts = []
    if options.strategy == "ddp":
        held = "parameters and gradients" if options.shard_optimizer else "parameters, moments and gradients"
        moments = f"moments sharded over {count(ranks, 'rank')}; " if options.shard_optimizer else ""
        facts.append(f"{moments}each rank holds {held}")
    else:
        ranks_of_replica = ranks // options.replicas
        facts.append(f"parameters, gradients and moments sharded over {count(ranks_of_replica, 'rank')}")
    if options.context_parallel > 1:
        facts.append(f"each sequence split among {options.context_parallel} ranks")
    if not options.reshard_after_forward:
        facts.append("full parameters until gradients are reduce-scattered")
    if options.strategy == "fsdp" and options.gradient_accumulation_steps > 1 and not options.sync_each_batch:
        facts.append("full gradients between micro-steps")
    if options.tensor_parallel > 1:
        facts.append(f"each layer split among {options.tensor_parallel} ranks")
    if options.expert_parallel > 1:
        facts.append(f"experts split among {options.expert_parallel} ranks")
    if options.cpu_offload:
        facts.append("shards and optimizer in host memory")
    return ", ".join(facts)


def dtype_names(tensors: Iterable[Any]) -> str:
    """The dtypes that occur among tensors, on disk or in memory."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def activations_line(options: Options) -> str:
    """Which activations of a layer are saved for the backward pass."""
    if options.gradient_checkpointing:
        where = ", in host memory" if options.offload_activations else ""
        return f"only the input of each layer is saved{where}; the rest is recomputed"
    if options.activation_memory_budget is not None:
        return f"{options.activation_memory_budget:.0%} of each layer's are saved; the rest is recomputed"
    return "saved for the backward pass"


def global_batch_line(options: Options, plan: Plan, ranks: int, tokens: int) -> str:
    """The product that makes a global batch, and its sequences and `tokens`."""
    factors = [
        count(options.per_device_train_batch_size, "sequence"),
        count(plan.accumulation, "micro-step"),
        data_parallel_groups(options, ranks // options.model_parallel_size),
    ]
    return f"{' x '.join(factors)} = {count(plan.global_batch_size, 'sequence')}, up to {tokens:,} tokens"


def optimizer_line(model: PreTrainedModel, options: Options) -> str:
    """The optimizer of each kind of parameter."""
    if options.optim != "muon":
        return "AdamW"
    elements = sum(matrix.numel() for matrix in decoder_matrices(model).values())
    return f"Muon for {elements:,} parameters in matrices of the decoder layers, AdamW for all others"


def learning_rate_line(options: Options, global_batch_size: int) -> str:
    """The highest learning rate, and how it follows from `reference_batch_size` where that is set."""
    if options.scale_learning_rate == "none":
        return f"{options.learning_rate:g}, not scaled with the global batch"
    base_rate = options.learning_rate / learning_rate_factor(options, global_batch_size)
    ratio = f"{global_batch_size} / {options.reference_batch_size} sequences"
    root = "sqrt" if options.scale_learning_rate == "sqrt" else ""
    return f"{options.learning_rate:g} = {base_rate:g} x {root}({ratio})"
