"""The stages of sharding by name, the memory of each, and advice when memory runs out."""

import contextlib
import dataclasses
import io
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from config.checks import check
from config.command_line import parse
from config.errors import OptionError, first_line
from config.options import Options
from estimate.memory import gib, host_memory, predict, readable
from model.build import build_model, load_config_and_tokenizer
from model.layers import decoder_layers
from parallel.checks import check_context_parallel
from runtime.gpus import write_memory_snapshot


def stage_name(options: Options) -> str:
    """The name of the stage: what is sharded, split or offloaded.

    The ZeRO stages are those of Rajbhandari et al. 2020, offload that of Ren et al. 2021 (ZeRO-Offload).
    """
    if options.strategy == "ddp":
        name = "DDP, optimizer sharded (ZeRO-1)" if options.shard_optimizer else "DDP"
    elif options.replicas > 1:
        name = f"hybrid FSDP, {options.replicas} replicas"
    else:
        name = "FSDP (ZeRO-3)" if options.reshard_after_forward else "FSDP, not resharded after forward (ZeRO-2)"
    if options.tensor_parallel > 1:
        name = f"tensor parallel {options.tensor_parallel} x {name}"
    if options.expert_parallel > 1:
        name = f"expert parallel {options.expert_parallel} x {name}"
    if options.context_parallel > 1:
        name = f"context parallel {options.context_parallel} x {name}"
    offloaded = ["shards"] * options.cpu_offload + ["layer inputs"] * options.offload_activations
    return f"{name}, {' and '.join(offloaded)} offloaded" if offloaded else name


def stages(options: Options, ranks: int) -> list[Options]:
    """`options` in every stage, from the least sharded to the most; hybrid for more than one node of 8 ranks.

    The last two stages offload shards, and shards and layer inputs, which implies gradient checkpointing.
    """
    sharded = dataclasses.replace(
        options,
        strategy="fsdp",
        shard_optimizer=False,
        replicas=1,
        reshard_after_forward=True,
        cpu_offload=False,
        offload_activations=False,
    )
    replicated = dataclasses.replace(
        sharded, strategy="ddp", tensor_parallel=1, expert_parallel=1, sync_each_batch=False
    )
    can_offload = options.optim != "muon" and options.expert_parallel == 1
    offloaded = [dataclasses.replace(sharded, cpu_offload=True)] if can_offload else []
    if offloaded and options.tensor_parallel == 1:
        inputs: dict[str, Any] = {"offload_activations": True, "gradient_checkpointing": True}
        inputs["activation_memory_budget"] = None  # the two exclude each other
        offloaded.append(dataclasses.replace(offloaded[0], **inputs))
    replicas, data_parallel_size = (
        options.replicas if options.replicas > 1 else ranks // 8,
        ranks // options.tensor_parallel,
    )
    hybrid = (
        [dataclasses.replace(sharded, replicas=replicas)]
        if replicas > 1 and data_parallel_size % replicas == 0 and options.expert_parallel == 1
        else []
    )
    not_resharded = dataclasses.replace(sharded, reshard_after_forward=False)
    return [
        replicated,
        dataclasses.replace(replicated, shard_optimizer=True),
        *hybrid,
        not_resharded,
        sharded,
        *offloaded,
    ]


def memory_forecast(model: PreTrainedModel, options: Options, ranks: int, capacity: int | None) -> str:
    """The predicted memory of a rank, for the start block; if its GPU has less, also the first stage that fits."""
    try:
        memory, host = predict(model, options, ranks), host_memory(model, options, ranks)
        predicted = f"predicted {memory}{_beside(model, options)}" + (
            f"; in host memory {readable(host)}" if host else ""
        )
        if capacity is None or memory.fits(capacity):
            return predicted
        fitting = [stage_name(other) for other in stages(options, ranks) if predict(model, other, ranks).fits(capacity)]
        fallback = "; ".join(["no stage fits", *advice(model, options, ranks)[:1]])
        remedy = f"use {fitting[0]}, which fits" if fitting else fallback
        return f"{predicted}\n{'':<13} more than this GPU's {gib(capacity)} GiB; {remedy}"
    except OptionError as error:
        return str(error)


def _beside(model: PreTrainedModel, options: Options) -> str:
    """The memory that the prediction leaves out, in words: masks for a window shorter than the sequence."""
    text_config = model.config.get_text_config()
    window, kinds = getattr(text_config, "sliding_window", None), getattr(text_config, "layer_types", None)
    tokens = options.block_size or 0
    if not window or window >= tokens or (kinds and "sliding_attention" not in kinds):
        return ""
    if options.packing == "documents" or options.context_parallel > 1:
        return ""
    return f", without masks of {tokens} x {tokens} in layers with a window"


def advice(model: PreTrainedModel, options: Options, ranks: int) -> list[str]:
    """Options that would save memory, with the GiB of a rank that each saves, the largest first."""
    micro_batch, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    changes: dict[str, dict[str, Any]] = {
        "--torch_compile true": {"torch_compile": True},
        "--bf16 true": {"bf16": True},
    }
    if options.optim != "muon":
        changes["--optim_state_dtype bfloat16"] = {"optim_state_dtype": "bfloat16"}
    if options.activation_memory_budget is None and decoder_layers(model) and model.supports_gradient_checkpointing:
        changes["--gradient_checkpointing"] = {"gradient_checkpointing": True}
    if micro_batch % 2 == 0:
        half = {"per_device_train_batch_size": micro_batch // 2, "gradient_accumulation_steps": 2 * accumulation}
        option_names = list(half)[: 1 if options.global_batch_size else 2]  # from which the accumulation would follow
        changes[" ".join(f"--{name} {half[name]}" for name in option_names)] = half
    elif micro_batch == 1 and _can_split(model, options, ranks):
        longer_group = {
            "context_parallel": 2 * options.context_parallel,
            "gradient_accumulation_steps": 2 * accumulation,
        }
        option_names = list(longer_group)[: 1 if options.global_batch_size else 2]
        changes[" ".join(f"--{name} {longer_group[name]}" for name in option_names)] = longer_group
    if options.strategy == "ddp" and ranks > 1:
        changes["--strategy fsdp"] = {"strategy": "fsdp", "shard_optimizer": False}
        changes["--shard_optimizer"] = {"shard_optimizer": True}
    if options.strategy == "fsdp":
        changes["--reshard_after_forward true"] = {"reshard_after_forward": True}
        changes["--replicas 1"] = {"replicas": 1}
    if options.strategy == "fsdp" and options.optim != "muon":
        changes["--cpu_offload true"] = {"cpu_offload": True}
    if options.strategy == "fsdp" and accumulation > 1:
        changes["--sync_each_batch true"] = {"sync_each_batch": True}
    if options.gradient_checkpointing and options.tensor_parallel == 1:
        changes["--offload_activations true"] = {"offload_activations": True}
    before = predict(model, options, ranks).total
    saved = {
        text: before - predict(model, dataclasses.replace(options, **change), ranks).total
        for text, change in changes.items()
    }
    ranking = sorted((-size, text) for text, size in saved.items() if size > 0)
    return [f"{text} saves {readable(-size)}" for size, text in ranking]


def _can_split(model: PreTrainedModel, options: Options, ranks: int) -> bool:
    """Whether twice as many ranks could split each sequence (parallel/context.py)."""
    group = 2 * options.context_parallel
    if ranks % group or options.tensor_parallel > 1 or options.objective == "dpo":
        return False
    try:
        check_context_parallel(model.config.get_text_config(), group)
    except OptionError:
        return False
    return True


def explain_out_of_memory(argv: list[str], error: Exception) -> str:
    """The predicted memory for the options `argv`, the memory of the GPU, options that save memory, and where more is.

    Returns "" for any other error than a lack of memory. A lack of host memory has no class of its own in torch.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return ""
    ranks = int(os.environ["WORLD_SIZE"])
    lines = [f"out of memory: {first_line(error)}"]
    if torch.cuda.is_available():
        now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        lines.append(f"allocated: {gib(now)} GiB, at most {gib(most)}, of {gib(torch.cuda.mem_get_info()[1])}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the table of a DeepSpeed file was printed at the start
            options = parse(argv, ranks)
        if options.memory_snapshot and isinstance(error, torch.OutOfMemoryError):
            lines.append(write_memory_snapshot(options.output_dir))
        check(options, ranks)
        model = build_model(options, load_config_and_tokenizer(options)[0])
        lines.append(f"predicted for {stage_name(options)}: {predict(model, options, ranks)}")
        needed = [
            f"{stage_name(stage)} {readable(predict(model, stage, ranks).total)}" for stage in stages(options, ranks)
        ]
        lines.append(f"for each stage: {'; '.join(needed)}")
        if host := host_memory(model, options, ranks):
            lines.append(
                f"host memory: {readable(host)} for each rank; a save copies the state unless --async_save false"
            )
        lines += advice(model, options, ranks)[:3]
    except OptionError as unknown:
        lines.append(str(unknown))
    return "\n".join([*lines, "remedies by what they cost in speed: docs/troubleshooting.md#out-of-memory"])
