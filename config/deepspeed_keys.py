"""The keys of a DeepSpeed file: which option each becomes, which has no effect and why, and which is refused."""

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

BATCH_OPTIONS = ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")

ZERO = "zero_optimization"

ADAM = "optimizer.params"

RATES = "scheduler.params"

ACTIVATIONS = "activation_checkpointing"

# Keys whose number or switch is one of our options, and what it must at least be.
DIRECT = {
    f"{ADAM}.lr": ("learning_rate", float),
    f"{ADAM}.weight_decay": ("weight_decay", float),
    f"{ADAM}.eps": ("adam_epsilon", float),
    "gradient_clipping": ("max_grad_norm", float),
    "steps_per_print": ("logging_steps", int),
    "bf16.enabled": ("bf16", bool),
    "bfloat16.enabled": ("bf16", bool),
}

# Keys with an option of ours, which decides where they are "auto".
OURS = {
    **{key: option for key, (option, _) in DIRECT.items()},
    **dict(zip(BATCH, BATCH_OPTIONS, strict=True)),
    "scheduler.type": "lr_scheduler_type",
    f"{RATES}.warmup_max_lr": "learning_rate",
    f"{RATES}.warmup_num_steps": "warmup_steps",
    f"{ZERO}.stage": "strategy",
    f"{ZERO}.offload_optimizer.device": "cpu_offload",
    f"{ZERO}.offload_param.device": "cpu_offload",
}

LAYERS = "the exchange is a layer (fsdp) or a bucket of DDP's own size"

MEMORY = "where memory lies is FSDP's own affair"

NVME = "for NVMe only"

ALWAYS_FP32 = "gradients are summed, reduced and kept in fp32"

# What only moves work or memory, and why it has no effect; a section's name stands for all of its keys.
NO_EFFECT = {
    f"{ADAM}.torch_adam": "the fused AdamW of torch, the same arithmetic",
    f"{ADAM}.adam_w_mode": "AdamW",
    f"{ADAM}.bias_correction": "as in AdamW",
    f"{ADAM}.fused": "always fused",
    f"{ADAM}.foreach": "always fused",
    f"{ADAM}.fp32_optimizer_states": "moments are always fp32",
    "optimizer.legacy_fusion": "always fused",
    f"{ZERO}.contiguous_gradients": MEMORY,
    f"{ZERO}.reduce_scatter": "fsdp always reduces to the shards, ddp to all",
    f"{ZERO}.reduce_bucket_size": LAYERS,
    f"{ZERO}.allgather_bucket_size": LAYERS,
    f"{ZERO}.allgather_partitions": LAYERS,
    f"{ZERO}.use_multi_rank_bucket_allreduce": LAYERS,
    f"{ZERO}.overlap_comm": "the exchange always overlaps with the backward",
    f"{ZERO}.compute_grad_norm": "always computed",
    f"{ZERO}.round_robin_gradients": MEMORY,
    f"{ZERO}.parameter_alignment": MEMORY,
    f"{ZERO}.sub_group_size": "one fused optimizer step over all shards",
    f"{ZERO}.ignore_unused_parameters": "every parameter of the models here is used",
    f"{ZERO}.load_from_fp32_weights": "masters are always loaded as fp32",
    f"{ZERO}.elastic_checkpoint": "any checkpoint resumes on any number of ranks",
    f"{ZERO}.pipeline_loading_checkpoint": "each rank reads its own slices",
    f"{ZERO}.legacy_stage1": "there is one stage 1",
    f"{ZERO}.zero_hpz_partition_size": "--replicas N keeps exchanges inside a host, with all that is sharded",
    f"{ZERO}.memory_efficient_linear": MEMORY,
    f"{ZERO}.override_module_apply": "nothing is overridden",
    f"{ZERO}.log_trace_cache_warnings": "there is no such trace",
    f"{ZERO}.enable_sanity_checks": "there are no such checks",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": "there is no Muon",
    f"{ZERO}.leaf_module": "a decoder layer is one unit",
    f"{ZERO}.cpu_offload_use_pin_memory": "always page-locked, on a GPU",
    f"{ZERO}.mics_hierarchical_params_gather": "an all-gather among the ranks of a replica",
    **{
        f"{ZERO}.{prefix}{name}": why
        for prefix in ("", "stage3_")
        for name, why in {
            "prefetch_bucket_size": "FSDP gathers one layer ahead",
            "param_persistence_threshold": "FSDP shards every parameter",
            "model_persistence_threshold": "FSDP shards every parameter",
            "max_live_parameters": "FSDP holds a layer or two, and the root",
            "max_reuse_distance": "--reshard_after_forward false is the choice that there is",
            "module_granularity_threshold": "a decoder layer is one unit",
            "use_all_reduce_for_fetch_params": LAYERS,
            "allgather_sequential": LAYERS,
            "gather_16bit_weights_on_model_save": "the finished model is always whole, in --save_dtype",
            "gather_fp16_weights_on_model_save": "the finished model is always whole, in --save_dtype",
        }.items()
    },
    **{
        f"{ZERO}.{section}.{name}": why
        for section in ("offload_optimizer", "offload_param")
        for name, why in {
            "pin_memory": "always page-locked, on a GPU",
            "ratio": "all of it is offloaded, or none",
            "nvme_path": NVME,
            "buffer_count": NVME,
            "buffer_size": NVME,
            "max_in_cpu": NVME,
            "pipeline_read": NVME,
            "pipeline_write": NVME,
            "pipeline": NVME,
            "fast_init": NVME,
            "super_offload": "one fused AdamW on the CPU",
            "cpuadam_cores_perc": "OMP_NUM_THREADS says it",
        }.items()
    },
    "fp16": "fp16 is off",
    "amp": "off",
    "bf16": "masters and reduction are fp32, and a gradient that is not finite changes nothing",
    "bfloat16": "masters and reduction are fp32, and a gradient that is not finite changes nothing",
    "torch_autocast": "--bf16 is torch.autocast",
    "data_types": ALWAYS_FP32,
    "seq_parallel_communication_data_type": ALWAYS_FP32,
    "prescale_gradients": "the loss is divided by all targets before the backward",
    "gradient_predivide_factor": "the loss is divided by all targets before the backward",
    "sparse_gradients": "gradients are dense",
    "disable_allgather": LAYERS,
    "zero_allow_untested_optimizer": "AdamW",
    "zero_force_ds_cpu_optimizer": "the fused AdamW of torch",
    "managed_gradient_accumulation": "the loop counts",
    "wall_clock_breakdown": "metrics.jsonl has the times of a step, and --trace_steps N what happens within it",
    "memory_breakdown": "metrics.jsonl always has peak_memory_gib",
    "dump_state": "the start block",
    "log_level": "there is one",
    "flops_profiler": "metrics.jsonl always has mfu",
    "timers": "metrics.jsonl has the times",
    "comms_logger": "it logs, and changes nothing",
    "monitor_config": "metrics.jsonl",
    "tensorboard": "events are in output_dir/tensorboard",
    "wandb": "metrics.jsonl has the same numbers",
    "comet": "metrics.jsonl has the same numbers",
    "csv_monitor": "metrics.jsonl has the same numbers",
    "checkpoint": "checkpoints are of this trainer",
    "nebula": "checkpoints are of this trainer",
    "datastates_ckpt": "--async_save",
    "aio": NVME,
    "pipeline": "for pipeline modules only",
    "hybrid_engine": "for generation inside of a step only",
    "compile": "--torch_compile",
    "dataloader_drop_last": "an epoch has whole global batches only",
    "vocabulary_size": "the model's",
    "disable_python_gc": "Python's collector runs",
    "use_data_before_expert_parallelism": "there is no expert parallelism",
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
    "tensor_parallel": "the plan that transformers has of the model",
    "expert_parallel": "off",
    "graph_harvesting": "off",
    f"{ACTIVATIONS}.partition_activations": "--gradient_checkpointing decides",
    f"{ACTIVATIONS}.cpu_checkpointing": "--gradient_checkpointing and --offload_activations decide",
    f"{ACTIVATIONS}.contiguous_memory_optimization": MEMORY,
    f"{ACTIVATIONS}.synchronize_checkpoint_boundary": "nothing waits",
    f"{ACTIVATIONS}.profile": "--torch_compile and checkpointing are not timed apart",
}

UNKNOWN = "not a key that is known here, and without effect"

# Keys that are followed in a way of their own; beside those of DIRECT and OURS.
FOLLOWED = (
    "tensor_parallel.autotp_size",
    "sequence_parallel_size",
    "tensorboard.enabled",
    "torch_autocast.enabled",
    "torch_autocast.dtype",
    "communication_data_type",
    "data_types.grad_accum_dtype",
    f"{ACTIVATIONS}.number_checkpoints",
)

# What a run does where the file says nothing: these are worth a line.
ABSENT = ("gradient_clipping", f"{ADAM}.lr", "bf16.enabled")

OTHER_BATCHES = "it changes what a step learns from; remove it"

OTHER_MODEL = "it changes what is trained; remove it"

# What would give other numbers, or another model, when it is on; and what to do.
REFUSED = {
    "amp.enabled": "apex is not here; write bf16 instead",
    f"{ADAM}.amsgrad": "AdamW is without it; remove it",
    f"{ADAM}.max_grad_norm": "DeepSpeed refuses it, too; write gradient_clipping",
    "elasticity.enabled": "it would choose the batch; remove it: --global_batch_size keeps it on any number of ranks",
    "autotuning.enabled": "it is a search, not a training; remove it",
    "data_efficiency.enabled": OTHER_BATCHES,
    "curriculum_learning.enabled": OTHER_BATCHES,
    "progressive_layer_drop.enabled": OTHER_MODEL,
    "eigenvalue.enabled": OTHER_MODEL,
    "quantize_training.enabled": OTHER_MODEL,
    "sparse_attention.mode": OTHER_MODEL,
    "expert_parallel.enabled": "it is not followed here; remove it",
    f"{ZERO}.zero_quantized_weights": "weights travel in bf16 or fp32; remove it",
    f"{ZERO}.zero_quantized_nontrainable_weights": "weights are kept in fp32; remove it",
    f"{ZERO}.zero_quantized_gradients": "gradients travel in fp32; remove it",
    f"{ZERO}.zeropp_loco_param": "gradients travel in fp32; remove it",
    f"{ZERO}.zenflow": "updates that come late are other updates; remove it",
    **{
        f"{section}.{name}": "masters, gradients and moments are fp32 here; remove it"
        for section in ("bf16", "bfloat16", "fp16")
        for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")
    },
    "gradient_allreduce_op": "gradients are those of the mean over all targets; remove it",
    "fp16.enabled": 'fp16 needs loss scaling, which is not here; bf16 has the range of fp32: write "bf16": {"enabled": '
    "true}",
}
