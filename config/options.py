"""Every option of the trainer: its group, default and help.

Names and meanings are those of transformers' `TrainingArguments` and of its example script `run_clm.py`, where these
have the option. docs/options.md explains the options that need more than one line.
"""

import dataclasses
import importlib.util
from typing import Any, Literal

import torch

# The groups of options, in the order of `python train.py --help`.
GROUPS = (
    MODEL := "Model",
    ADAPTERS := "Adapters (LoRA)",
    DATA := "Data",
    SEQUENCES := "From records to sequences",
    BATCH := "Global batch",
    OBJECTIVE := "Objective",
    OPTIMIZER := "Optimizer and schedule",
    STRATEGY := "Strategy: how ranks share the work",
    PRECISION := "Precision, compilation and memory",
    OUTPUT := "Output directory and checkpoints",
    LOGGING := "Evaluation and logging",
    SEED := "Seed and determinism",
)

# Options that take paths, in which ~ is expanded.
PATHS = (
    *("model_name_or_path", "config_name", "tokenizer_name", "chat_template", "deepspeed", "output_dir"),
    *("train_file", "train_mixture", "validation_file", "dataset_name", "dataset_info", "data_cache_dir"),
    *("resume_from_checkpoint", "logging_dir"),
)

# Options that take several values, with commas between them; in a run file, also a list.
LISTS = {"train_file", "train_mixture", "validation_file", "dataset", "lora_target_modules", "report_to"}

ALL_LINEAR = "all-linear"  # of lora_target_modules: all linear modules but the head

# What report_to can name. Each is a package, too, which is imported only if it is named (metrics/trackers.py).
TRACKERS = ("tensorboard", "wandb", "swanlab")

# Options that take a number of steps, a fraction of all steps, or EPOCH. plan_run makes each a number of steps.
INTERVALS = ("logging_steps", "eval_steps", "save_steps")
EPOCH = -1

# All ranks must have the same options. Otherwise they wait for each other in different collectives. These options may
# differ between nodes. Paths may, because the content of their files is compared instead (checkpoint/identity.py). The
# others may, because they do not change the result, or because only rank 0 reads them.
MAY_DIFFER_BETWEEN_NODES = {
    *("model_name_or_path", "config_name", "tokenizer_name", "chat_template", "deepspeed", "output_dir"),
    *("train_file", "train_mixture", "validation_file", "dataset_name", "dataset_info", "data_cache_dir"),
    "torch_compile",
    *("preprocessing_num_workers", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("resume_from_checkpoint", "overwrite_output_dir", "report_to", "disable_tqdm", "show_examples", "trace_steps"),
    *("prompt", "report", "run_name", "logging_dir", "memory_snapshot"),
}

# Old names of options, still accepted on the command line and in a run file, with a line that says the new name.
RENAMED = {"max_targetless_share": "max_targetless_fraction"}

# The keys of lr_scheduler_kwargs. The highest rate is learning_rate, and the length of the warmup is warmup_steps.
# The schedules of transformers' get_scheduler, with its names and keys:
TRANSFORMERS_SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "constant": (),
    "constant_with_warmup": (),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
# The schedules of DeepSpeed, with its names and keys:
DEEPSPEED_SCHEDULES = {
    "WarmupLR": ("warmup_type", "warmup_min_lr"),
    "WarmupDecayLR": ("warmup_type", "warmup_min_lr", "total_num_steps"),
    "WarmupCosineLR": ("warmup_type", "warmup_min_ratio", "cos_min_ratio", "total_num_steps"),
}


def option(group: str, default: Any, help: str) -> Any:
    """A field of `Options`: its group in --help, its default, and its help without the default."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help})


@dataclasses.dataclass
class Options:
    """The options of one run. `parse` reads them (config/command_line.py), `check` refuses what cannot work."""

    model_name_or_path: str | None = option(MODEL, None, "Model to train: a local directory or a hub id.")
    config_name: str | None = option(MODEL, None, "Model configuration, local or on the hub, for random weights.")
    tokenizer_name: str | None = option(MODEL, None, "Tokenizer, local or on the hub. Default: the model's own.")
    trust_remote_code: bool = option(MODEL, False, "Run Python files that come with the model or tokenizer.")

    use_peft: bool = option(ADAPTERS, False, "Freeze the model, and train LoRA adapters of it.")
    lora_r: int = option(ADAPTERS, 16, "Rank of an adapter: the inner size of its two matrices.")
    lora_alpha: float = option(ADAPTERS, 32, "The output of an adapter is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(ADAPTERS, 0.05, "Dropout of an adapter's input.")
    lora_target_modules: str = option(ADAPTERS, ALL_LINEAR, "all-linear, or names of linear modules: q_proj,v_proj.")
    use_rslora: bool = option(ADAPTERS, False, "Scale by lora_alpha / sqrt(lora_r) instead.")
    merge_lora: bool = option(ADAPTERS, False, "Export the model with its adapters added, not the adapters.")

    train_file: str | None = option(
        DATA, None, "Training data: file, directory, glob or URL; .txt .jsonl .json .parquet .gz .zst."
    )
    train_mixture: str | None = option(DATA, None, "Weighted sources: a.jsonl=0.7,b.jsonl=0.3 of the sequences.")
    validation_file: str | None = option(DATA, None, "Validation data, in the formats of train_file.")
    validation_split_percentage: int = option(DATA, 5, "Without validation data: percentage held out for it.")
    dataset_name: str | None = option(DATA, None, "Data set to train on: a local directory or a hub id.")
    dataset: str | None = option(DATA, None, "Names of data sets in dataset_info, with commas between them.")
    dataset_info: str | None = option(DATA, None, "LLaMA-Factory's dataset_info.json, or its directory.")
    dataset_config_name: str | None = option(DATA, None, "Configuration of the data set, if it has several.")
    data_format: Literal["auto", "text", "messages", "sharegpt", "prompt", "alpaca", "preference"] = option(
        DATA, "auto", "Shape of the records. auto: detected by their columns."
    )
    train_on_last_turn: bool = option(DATA, False, "Train only on the last answer of a conversation, not on all.")
    text_column: str = option(DATA, "text", "Column that holds the text of a document.")
    streaming: bool = option(DATA, False, "Read and tokenize while training, for data larger than the disk.")
    data_cache_dir: str = option(DATA, "~/.cache/raw-trainer", "Directory of tokenized data, kept between runs.")
    max_record_bytes: int = option(DATA, 1 << 26, "Largest record, or line of text. A larger one is refused.")
    preprocessing_num_workers: int | None = option(DATA, None, "Processes that tokenize. Default: one for each core.")
    dataloader_num_workers: int = option(DATA, 2, "Processes of each rank that load micro-batches.")
    dataloader_prefetch_factor: int = option(DATA, 2, "Micro-batches that each of them loads ahead.")

    block_size: int | None = option(SEQUENCES, None, "Tokens in a sequence. Default: 1024, or fewer if the model has.")
    packing: Literal["concat", "documents", "none"] | None = option(
        SEQUENCES, None, "How documents fill sequences. Default: documents for conversations, else concat."
    )
    chat_template: str | None = option(SEQUENCES, None, "File with a chat template (Jinja). Default: the tokenizer's.")
    chat_template_kwargs: str | None = option(
        SEQUENCES, None, 'JSON with variables of the chat template, as {"enable_thinking": false}.'
    )
    max_targetless_fraction: float = option(
        SEQUENCES, 0.1, "Fraction of conversations that may be left out: no token to train on."
    )
    show_examples: int = option(
        SEQUENCES, 0, "Sequences to print at the start. Tokens trained on are green, or within « »."
    )

    per_device_train_batch_size: int = option(BATCH, 8, "Sequences in a micro-batch of one rank.")
    per_device_eval_batch_size: int = option(BATCH, 8, "Sequences in a micro-batch of one rank, in evaluation.")
    gradient_accumulation_steps: int = option(BATCH, 1, "Micro-batches of one rank in an optimizer step.")
    global_batch_size: int | None = option(BATCH, None, "Sequences in an optimizer step; sets the accumulation.")

    objective: Literal["sft", "dpo"] = option(
        OBJECTIVE, "sft", "sft: next token. dpo: prefer chosen to rejected answers."
    )
    dpo_beta: float = option(OBJECTIVE, 0.1, "dpo: how strongly the model is held to its initial weights.")

    router_aux_loss_coef: float | None = option(
        OBJECTIVE, None, "Mixtures: weight of the load-balancing loss. Default: the model's configuration."
    )
    router_bias_update_rate: float = option(
        OBJECTIVE, 0.0, "Mixtures: step of the biases that balance experts, as 0.001."
    )

    num_train_epochs: float = option(OPTIMIZER, 3.0, "Passes over the training sequences. 0: only evaluate.")
    max_steps: int = option(OPTIMIZER, -1, "Optimizer steps. Above 0, it overrides num_train_epochs.")
    optim: Literal["adamw_torch_fused", "muon"] = option(
        OPTIMIZER, "adamw_torch_fused", "muon: layer matrices by Muon, all else by AdamW."
    )
    optim_state_dtype: Literal["float32", "bfloat16"] = option(
        OPTIMIZER, "float32", "Dtype of AdamW's moments. bfloat16 is rounded stochastically."
    )
    learning_rate: float = option(
        OPTIMIZER, 5e-5, "Highest learning rate, reached after the warmup; 0.0002 with use_peft."
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "constant",
        "constant_with_warmup",
        "warmup_stable_decay",
        "WarmupLR",
        "WarmupDecayLR",
        "WarmupCosineLR",
    ] = option(OPTIMIZER, "linear", "Schedule of transformers, or Warmup*: of DeepSpeed.")
    lr_scheduler_kwargs: str | None = option(OPTIMIZER, None, "JSON with the parameters of the schedule.")
    min_lr: float | None = option(OPTIMIZER, None, "Learning rate at which a schedule with a lowest rate ends.")
    warmup_steps: float = option(OPTIMIZER, 0.0, "Steps of warmup. Below 1: a fraction of all steps.")
    scale_learning_rate: Literal["none", "sqrt", "linear"] = option(
        OPTIMIZER, "none", "Multiply learning_rate by global batch / reference_batch_size, or its root."
    )
    reference_batch_size: int | None = option(OPTIMIZER, None, "Global batch that learning_rate is meant for.")
    weight_decay: float = option(OPTIMIZER, 0.0, "Decay of matrices. Norms and biases never decay.")
    adam_beta1: float = option(OPTIMIZER, 0.9, "AdamW: decay of the first moment.")
    adam_beta2: float = option(OPTIMIZER, 0.999, "AdamW: decay of the second moment.")
    adam_epsilon: float = option(OPTIMIZER, 1e-8, "AdamW: term added to the denominator.")
    max_grad_norm: float = option(OPTIMIZER, 1.0, "Clip gradients to this norm. 0: never.")
    max_skipped_steps: int = option(
        OPTIMIZER, 10, "Consecutive skipped steps (no target, gradient not finite) before an error."
    )

    strategy: Literal["ddp", "fsdp"] = option(
        STRATEGY, "ddp", "ddp: each rank holds the model. fsdp: parameters are sharded."
    )
    reshard_after_forward: bool = option(STRATEGY, True, "fsdp: free a layer's full parameters after its forward.")
    replicas: int = option(STRATEGY, 1, "fsdp: replicas of the model, each sharded; above 1, hybrid sharding.")
    tensor_parallel: int = option(STRATEGY, 1, "fsdp: consecutive ranks that split each layer.")
    context_parallel: int = option(STRATEGY, 1, "Consecutive ranks that split each sequence.")
    expert_parallel: int = option(STRATEGY, 1, "fsdp: consecutive ranks that split the experts of each layer.")
    shard_optimizer: bool = option(STRATEGY, False, "ddp: shard the optimizer; each rank updates its shard (ZeRO-1).")
    sync_each_batch: bool = option(
        STRATEGY, False, "fsdp: reduce-scatter gradients in each micro-step, not once a step."
    )
    reduce_dtype: Literal["float32", "bfloat16"] = option(
        STRATEGY, "float32", "fsdp: dtype in which gradients are reduced."
    )
    cpu_offload: bool = option(STRATEGY, False, "fsdp: shards and optimizer in host memory, AdamW on the CPU.")
    ddp_backend: Literal["nccl", "gloo"] | None = option(
        STRATEGY, None, "Default: nccl on GPUs, else gloo. gloo lets ranks share a GPU."
    )
    ddp_timeout: int = option(STRATEGY, 1800, "Seconds after which a collective fails.")
    flight_recorder: bool = option(STRATEGY, False, "Write the last collectives of each rank when one hangs.")
    deepspeed: str | None = option(
        STRATEGY, None, "DeepSpeed file; its keys become options (config/peers/deepspeed.py)."
    )

    bf16: bool = option(
        PRECISION, torch.cuda.is_available(), "Compute in bf16 over fp32 parameters. Default: true with a GPU that can."
    )
    bf16_residual: bool = option(PRECISION, False, "bf16 with ddp: bf16 between layers, too. fsdp always does this.")
    float8: bool = option(PRECISION, False, "bf16: matrix products of the decoder layers in float8.")
    torch_compile: bool = option(
        PRECISION, torch.cuda.is_available(), "Compile each layer. With a GPU, the default is true."
    )
    cuda_graphs: Literal["auto", "true", "false"] = option(
        PRECISION, "auto", "Launch all kernels of a micro-step at once. auto: where possible."
    )
    gradient_checkpointing: bool = option(PRECISION, False, "Save only each layer's input, and recompute the rest.")
    offload_activations: bool = option(PRECISION, False, "gradient_checkpointing: save these inputs in host memory.")
    activation_memory_budget: float | None = option(
        PRECISION, None, "torch_compile: fraction of activations to save, from 0 to 1."
    )

    output_dir: str = option(OUTPUT, "output", "Directory of the checkpoints, metrics and final model.")
    overwrite_output_dir: bool = option(OUTPUT, False, "Replace the run in output_dir, unless it is resumed.")
    resume_from_checkpoint: str | None = option(OUTPUT, None, "A checkpoint directory, or auto: the newest valid one.")
    save_steps: float = option(
        OUTPUT, 500, "Steps between checkpoints, a fraction, or epoch. 0: none, also at the end."
    )
    save_total_limit: int | None = option(OUTPUT, None, "Newest checkpoints to keep. Default: all.")
    save_dtype: Literal["bfloat16", "float32"] = option(OUTPUT, "bfloat16", "Dtype of the final model's files.")
    async_save: bool = option(OUTPUT, True, "Continue to train while a checkpoint is written.")

    logging_steps: float = option(
        LOGGING, 10, "Steps between records of metrics.jsonl, each with the loss of its step."
    )
    logging_first_step: bool = option(LOGGING, False, "A record of the first step, too.")
    eval_steps: float = option(LOGGING, 0, "Steps between evaluations. 0: only before and after training.")
    eval_on_start: bool = option(LOGGING, True, "Evaluate before the first step, too.")
    load_best_model_at_end: bool = option(
        LOGGING, False, "Export the evaluated checkpoint with the best metric, not the last one."
    )
    metric_for_best_model: str | None = option(LOGGING, None, "Metric that decides. Default: eval_loss.")
    early_stopping_patience: int | None = option(
        LOGGING, None, "Evaluations in a row without improvement that end training. Default: never."
    )
    early_stopping_threshold: float = option(LOGGING, 0.0, "By how much the metric must fall to count as improved.")
    report_to: str = option(LOGGING, "none", "Trackers: tensorboard,wandb,swanlab, or all: those installed.")
    run_name: str | None = option(LOGGING, None, "Name of the run in the trackers. Default: output_dir.")
    logging_dir: str | None = option(LOGGING, None, "Directory of the trackers' files. Default: output_dir.")
    disable_tqdm: bool | None = option(
        LOGGING,
        None,
        "No progress bar, but lines every logging_steps. Default: off on a terminal.",
    )
    ledger: bool = option(LOGGING, False, "Record the sequences of each step, for `python -m data.ledger`.")
    trace_steps: int = option(LOGGING, 0, "Steps to trace with the profiler on rank 0, after two others.")
    memory_snapshot: bool = option(LOGGING, False, "Out of GPU memory: write each allocation into output_dir/memory.")
    prompt: str | None = option(
        LOGGING, None, "Text, or message of a user, that the trained model completes at the end."
    )
    sample_prompts: str | None = option(
        LOGGING, None, "Text, or file with a prompt on each line, to complete at each evaluation."
    )
    report: bool = option(LOGGING, False, "Write report.html at the end, as `python -m metrics.report` does.")

    seed: int = option(SEED, 42, "Seed of the initial weights, the data order and dropout.")
    full_determinism: bool = option(SEED, False, "Only algorithms with the same bits each time; slower on a GPU.")

    @property
    def trackers(self) -> list[str]:
        """The trackers that report_to names; for all, those that are installed."""
        if self.report_to == "all":
            return [name for name in TRACKERS if importlib.util.find_spec(name)]
        return self.report_to.split(",") if self.report_to != "none" else []

    @property
    def evaluates_only(self) -> bool:
        """Whether the run evaluates the model and trains nothing."""
        return self.max_steps <= 0 and self.num_train_epochs == 0

    @property
    def model_parallel_size(self) -> int:
        """Consecutive ranks that read the same sequences, because they split each layer or each sequence."""
        return self.tensor_parallel * self.context_parallel
