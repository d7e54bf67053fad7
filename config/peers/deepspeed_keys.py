"""The keys of a DeepSpeed file: which option each sets, which has no effect and why, and which is refused."""

import difflib
import json
from typing import Any

from config.options import Options

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

BATCH_OPTIONS = ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")

ZERO = "zero_optimization"

ADAM = "optimizer.params"

RATES = "scheduler.params"

ACTIVATIONS = "activation_checkpointing"

# Keys whose value is the value of an option, and its type.
DIRECT = {
    f"{ADAM}.lr": ("learning_rate", float),
    f"{ADAM}.weight_decay": ("weight_decay", float),
    f"{ADAM}.eps": ("adam_epsilon", float),
    "gradient_clipping": ("max_grad_norm", float),
    "bf16.enabled": ("bf16", bool),
    "bfloat16.enabled": ("bf16", bool),
}

# Keys with an option that decides if they are "auto".
DECIDING_OPTION = {
    **{key: option for key, (option, _) in DIRECT.items()},
    **dict(zip(BATCH, BATCH_OPTIONS, strict=True)),
    "scheduler.type": "lr_scheduler_type",
    f"{RATES}.warmup_max_lr": "learning_rate",
    f"{RATES}.warmup_num_steps": "warmup_steps",
    f"{ZERO}.stage": "strategy",
    f"{ZERO}.offload_optimizer.device": "cpu_offload",
    f"{ZERO}.offload_param.device": "cpu_offload",
}

LAYERS = "communication is by layer (fsdp) or by a bucket of DDP's size"

MEMORY = "the layout of memory is fixed"

NVME = "for NVMe only"

FP32_ACCUMULATION = "gradients accumulate in fp32"

REDUCE_DTYPE = "gradients are reduced in --reduce_dtype"

# Keys without an effect, because they only move work or memory, and the reason. A section means all of its keys.
NO_EFFECT = {
    f"{ADAM}.torch_adam": "the fused AdamW of torch, the same arithmetic",
    f"{ADAM}.adam_w_mode": "AdamW",
    f"{ADAM}.bias_correction": "AdamW corrects the bias",
    f"{ADAM}.fused": "always fused",
    f"{ADAM}.foreach": "always fused",
    f"{ADAM}.fp32_optimizer_states": "--optim_state_dtype decides",
    "optimizer.legacy_fusion": "always fused",
    f"{ZERO}.contiguous_gradients": MEMORY,
    f"{ZERO}.reduce_scatter": "fsdp always reduces to the shards, ddp to all",
    f"{ZERO}.reduce_bucket_size": LAYERS,
    f"{ZERO}.allgather_bucket_size": LAYERS,
    f"{ZERO}.allgather_partitions": LAYERS,
    f"{ZERO}.use_multi_rank_bucket_allreduce": LAYERS,
    f"{ZERO}.overlap_comm": "communication always overlaps with the backward pass",
    f"{ZERO}.compute_grad_norm": "always computed",
    f"{ZERO}.round_robin_gradients": MEMORY,
    f"{ZERO}.parameter_alignment": MEMORY,
    f"{ZERO}.sub_group_size": "one fused optimizer step over all shards",
    f"{ZERO}.ignore_unused_parameters": "every parameter of the models here is used",
    f"{ZERO}.load_from_fp32_weights": "fp32 weights are always loaded",
    f"{ZERO}.elastic_checkpoint": "every checkpoint resumes on any number of ranks",
    f"{ZERO}.pipeline_loading_checkpoint": "each rank reads its own slices",
    f"{ZERO}.legacy_stage1": "there is one stage 1",
    f"{ZERO}.zero_hpz_partition_size": "--replicas N keeps all communication of shards inside a node",
    f"{ZERO}.memory_efficient_linear": MEMORY,
    f"{ZERO}.override_module_apply": "nothing is overridden",
    f"{ZERO}.log_trace_cache_warnings": "there is no such trace",
    f"{ZERO}.enable_sanity_checks": "there are no such checks",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": "for NVMe only; the moment of --optim muon is always in memory",
    f"{ZERO}.leaf_module": "a decoder layer is one unit",
    f"{ZERO}.cpu_offload_use_pin_memory": "always page-locked if there is a GPU",
    f"{ZERO}.mics_hierarchical_params_gather": "an all-gather among the ranks of a replica",
    **{
        f"{ZERO}.{prefix}{name}": why
        for prefix in ("", "stage3_")
        for name, why in {
            "prefetch_bucket_size": "FSDP gathers one layer ahead",
            "param_persistence_threshold": "FSDP shards every parameter",
            "model_persistence_threshold": "FSDP shards every parameter",
            "max_live_parameters": "FSDP gathers a layer or two, and the root",
            "max_reuse_distance": "--reshard_after_forward decides",
            "module_granularity_threshold": "a decoder layer is one unit",
            "use_all_reduce_for_fetch_params": LAYERS,
            "allgather_sequential": LAYERS,
            "gather_16bit_weights_on_model_save": "the final model always has full parameters, in --save_dtype",
            "gather_fp16_weights_on_model_save": "the final model always has full parameters, in --save_dtype",
        }.items()
    },
    **{
        f"{ZERO}.{section}.{name}": why
        for section in ("offload_optimizer", "offload_param")
        for name, why in {
            "pin_memory": "always page-locked if there is a GPU",
            "ratio": "all or nothing is offloaded",
            "nvme_path": NVME,
            "buffer_count": NVME,
            "buffer_size": NVME,
            "max_in_cpu": NVME,
            "pipeline_read": NVME,
            "pipeline_write": NVME,
            "pipeline": NVME,
            "fast_init": NVME,
            "super_offload": "one fused AdamW on the CPU",
            "cpuadam_cores_perc": "OMP_NUM_THREADS decides",
        }.items()
    },
    "fp16": "fp16 is off",
    "amp": "off",
    "bf16": "parameters are fp32, and a gradient that is not finite changes nothing",
    "bfloat16": "parameters are fp32, and a gradient that is not finite changes nothing",
    "torch_autocast": "--bf16 is torch.autocast",
    "data_types": FP32_ACCUMULATION,
    "seq_parallel_communication_data_type": REDUCE_DTYPE,
    "prescale_gradients": "the loss is divided by all targets before the backward",
    "gradient_predivide_factor": "the loss is divided by all targets before the backward",
    "sparse_gradients": "gradients are dense",
    "disable_allgather": LAYERS,
    "zero_allow_untested_optimizer": "no optimizer needs a permission",
    "zero_force_ds_cpu_optimizer": "the fused AdamW of torch",
    "managed_gradient_accumulation": "the training loop counts",
    "wall_clock_breakdown": "metrics.jsonl has the times of a step, and --trace_steps N traces its kernels",
    "memory_breakdown": "metrics.jsonl always has peak_memory_gib",
    "dump_state": "the start block shows it",
    "log_level": "there is one level",
    "flops_profiler": "metrics.jsonl always has mfu",
    "timers": "metrics.jsonl has the times of a step",
    "comms_logger": "--trace_steps N counts the collectives",
    "monitor_config": "metrics.jsonl has the numbers",
    "tensorboard": "events are in output_dir/tensorboard",
    "wandb": "metrics.jsonl has the same numbers",
    "comet": "metrics.jsonl has the same numbers",
    "csv_monitor": "metrics.jsonl has the same numbers",
    "checkpoint": "checkpoints have the format of this trainer",
    "nebula": "checkpoints have the format of this trainer",
    "datastates_ckpt": "--async_save decides",
    "aio": NVME,
    "pipeline": "for pipeline modules only",
    "hybrid_engine": "for generation within a step only",
    "compile": "--torch_compile decides",
    "dataloader_drop_last": "an epoch has full global batches only",
    "vocabulary_size": "the model decides",
    "disable_python_gc": "Python's garbage collector runs",
    "use_data_before_expert_parallelism": "--expert_parallel decides",
    "elasticity": "off",
    "autotuning": "off",
    "data_efficiency": "off",
    "curriculum_learning": "off",
    "progressive_layer_drop": "off",
    "eigenvalue": "off",
    "sparse_attention": "off",
    "compression_training": "off",
    "quantize_training": "off",
    "weight_quantization": "off",
    "tensor_parallel": "the plan that transformers has for the model decides",
    "expert_parallel": "--expert_parallel decides",
    "graph_harvesting": "off",
    f"{ACTIVATIONS}.partition_activations": "--gradient_checkpointing decides",
    f"{ACTIVATIONS}.cpu_checkpointing": "--gradient_checkpointing and --offload_activations decide",
    f"{ACTIVATIONS}.contiguous_memory_optimization": MEMORY,
    f"{ACTIVATIONS}.synchronize_checkpoint_boundary": "no rank synchronizes at a checkpoint boundary",
    f"{ACTIVATIONS}.profile": "recomputation is not timed separately",
}

UNKNOWN = "not known here, without effect"

# Further keys that have an effect, each handled by code of its own in config/peers/deepspeed.py.
FOLLOWED = (
    "steps_per_print",
    "tensor_parallel.autotp_size",
    "sequence_parallel_size",
    "tensorboard.enabled",
    "torch_autocast.enabled",
    "torch_autocast.dtype",
    "communication_data_type",
    "data_types.grad_accum_dtype",
    f"{ACTIVATIONS}.number_checkpoints",
)

# Keys that get a line even if the file does not have them.
ABSENT = ("gradient_clipping", f"{ADAM}.lr", "bf16.enabled")

OTHER_BATCHES = "it changes the batches; remove the key"

OTHER_MODEL = "it changes the model; remove the key"

# Keys that would change the numbers or the model if they are on, with the remedy.
REFUSED = {
    "amp.enabled": "apex is not supported; write bf16 instead",
    f"{ADAM}.amsgrad": "AdamW has no amsgrad here; remove the key",
    f"{ADAM}.max_grad_norm": "DeepSpeed refuses it, too; write gradient_clipping",
    "elasticity.enabled": "it would choose the batch; remove the key and pass --global_batch_size",
    "autotuning.enabled": "it is a search and not a training; remove the key",
    "data_efficiency.enabled": OTHER_BATCHES,
    "curriculum_learning.enabled": OTHER_BATCHES,
    "progressive_layer_drop.enabled": OTHER_MODEL,
    "eigenvalue.enabled": OTHER_MODEL,
    "quantize_training.enabled": OTHER_MODEL,
    "sparse_attention.mode": OTHER_MODEL,
    "expert_parallel.enabled": "an option sets it; pass --expert_parallel N, and remove the key",
    f"{ZERO}.zero_quantized_weights": "weights are gathered in bf16 or fp32; remove the key",
    f"{ZERO}.zero_quantized_nontrainable_weights": "weights are fp32; remove the key",
    f"{ZERO}.zero_quantized_gradients": "gradients are reduced in fp32 or bf16; remove the key",
    f"{ZERO}.zeropp_loco_param": "gradients are reduced in fp32 or bf16; remove the key",
    f"{ZERO}.zenflow": "late updates change the numbers; remove the key",
    **{
        f"{section}.{name}": "parameters and gradients are fp32; remove the key"
        for section in ("bf16", "bfloat16", "fp16")
        for name in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads")
    },
    **{
        f"{section}.bf16_optimizer_states": "an option sets it; pass --optim_state_dtype bfloat16, and remove the key"
        for section in ("bf16", "bfloat16", "fp16")
    },
    "gradient_allreduce_op": "gradients are those of the mean over all targets; remove the key",
    "fp16.enabled": 'fp16 needs loss scaling, which is not implemented\nwrite "bf16": {"enabled": true} instead',
}


def explain_unused(key: str, value: Any, options: Options) -> str:
    """The meaning of a key that set no option: left to an option, without effect and why, or unknown."""
    if value in ("auto", None) and key in DECIDING_OPTION:
        return left_to_option(options, DECIDING_OPTION[key])
    if key in REFUSED or key in FOLLOWED:
        return "no effect: off"
    with_effect = {*DECIDING_OPTION, *REFUSED, *FOLLOWED}
    known = {*with_effect, *NO_EFFECT}
    if any(other.startswith(f"{key}.") for other in known):  # a section
        return "no effect: empty" if value == {} else f"{UNKNOWN}; it takes a mapping, as in DeepSpeed"
    section, _, name = key.rpartition(".")

    def close(words: set[str], word: str) -> str:
        return "".join(difflib.get_close_matches(word, words, n=1, cutoff=0.75))

    def within(section: str, keys: set[str]) -> set[str]:
        return {other.rpartition(".")[2] for other in keys - {key} if other.rpartition(".")[0] == section}

    # A typo may be meant for a key with an effect, even in a section whose other keys have none.
    if key not in NO_EFFECT and (meant := close(within(section, with_effect), name)):
        return f"{UNKNOWN}; did you mean {'.'.join(filter(None, [section, meant]))}?"
    for parent in [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]:
        if parent in NO_EFFECT:
            return f"no effect: {NO_EFFECT[parent]}"
    sections = {other.rpartition(".")[0] for other in known} | within("", known)
    section = section if section in sections else close(sections, section)
    meant = close(within(section, known), name)
    return UNKNOWN + (f"; did you mean {'.'.join(filter(None, [section, meant]))}?" if meant else "")


def left_to_option(options: Options, *names: str) -> str:
    """Say that options decide, with their values."""
    return f"left to {', '.join(f'{name} {shown(getattr(options, name))}' for name in names)}"


def shown(value: Any) -> str:
    """The value of an option as a user writes it."""
    return json.dumps(value) if isinstance(value, bool) else str(value)
