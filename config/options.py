"""Every option of the trainer: its name, default, help and check.

Names and meanings are those of transformers' `TrainingArguments` and of `run_clm.py`; the few new ones are `strategy`,
`reshard_after_forward`, `replicas`, `tensor_parallel`, `context_parallel`, `cpu_offload`, `sync_each_batch`,
`reduce_dtype`, `shard_optimizer`, `offload_activations`, `activation_memory_budget`, `global_batch_size`,
`train_mixture`, `packing`, `text_column`, `data_format`, `chat_template`, `max_targetless_fraction`, `show_examples`,
`data_cache_dir`, `max_skipped_steps`, `bf16_residual`, `float8`, `async_save`, `save_dtype`, `objective`, `dpo_beta`,
`ledger`, `trace_steps`, `scale_learning_rate`, `reference_batch_size` and `prompt`.
"""

import dataclasses
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

# Options that may differ between hosts: paths, of which the content must be the same, and what concerns one alone.
MAY_DIFFER_BETWEEN_NODES = {
    *("model_name_or_path", "config_name", "tokenizer_name", "chat_template", "deepspeed", "output_dir"),
    *("train_file", "train_mixture", "validation_file", "dataset_name", "data_cache_dir", "torch_compile"),
    *("preprocessing_num_workers", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("resume_from_checkpoint", "overwrite_output_dir", "report_to", "show_examples", "trace_steps", "prompt"),
}

# What lr_scheduler_kwargs may hold; beside it, learning_rate is the highest rate and warmup_steps the warmup.
SCHEDULE_PARAMETERS = {
    "WarmupLR": ("warmup_type", "warmup_min_lr"),
    "WarmupDecayLR": ("warmup_type", "warmup_min_lr", "total_num_steps"),
    "WarmupCosineLR": ("warmup_type", "warmup_min_ratio", "cos_min_ratio", "total_num_steps"),
}


@dataclasses.dataclass
class Options:
    """The options of one run. `parse` reads them, `check` refuses what cannot work."""

    # The model
    model_name_or_path: str | None = HfArg(
        default=None, help="Model to train: a local directory or a hub id. None: a small one with random weights."
    )
    config_name: str | None = HfArg(
        default=None, help="Directory or hub id of a model configuration, to be trained from random weights."
    )
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, if it is not the model's own.")
    trust_remote_code: bool = HfArg(
        default=False, help="Run Python files that come with a model or tokenizer. They may do anything here."
    )

    # The data
    train_file: str | None = HfArg(
        default=None,
        help="Training text: a file, a directory, a quoted glob, or several with commas between; .txt (one document a "
        "file), .jsonl or .json (one record a line; also .gz and .zst), .parquet.",
    )
    train_mixture: str | None = HfArg(
        default=None,
        help="Several sources with weights instead: a.jsonl=0.7,b.jsonl=0.3 are the shares of the rows of an epoch.",
    )
    validation_file: str | None = HfArg(default=None, help="Validation text, like train_file.")
    dataset_name: str | None = HfArg(default=None, help="Training data by hub id or local directory, via `datasets`.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set, if it has several.")
    streaming: bool = HfArg(
        default=False,
        help="Read and tokenize the training data while training: for sets that do not fit on a disk. No row-wise "
        "shuffle (data/stream.py); needs max_steps, and holds nothing out.",
    )
    text_column: str = HfArg(default="text", help="Column that holds the text of a document.")
    validation_split_percentage: int = HfArg(
        default=5, help="Without validation data: the last rows in this percentage are held out. 0: no validation."
    )
    block_size: int | None = HfArg(
        default=None, help="Tokens in one row. None: 1024, or the model's positions where those are fewer."
    )
    packing: Literal["concat", "documents", "none"] | None = HfArg(
        default=None,
        help="concat: documents are joined with EOS and cut into rows. documents: whole documents share a row, without "
        "attention between them. none: one row per document, padded to the longest of a micro-batch. "
        "None: documents for conversations, concat for text; a pair of dpo is always a row of its own.",
    )
    data_format: Literal["auto", "text", "messages", "sharegpt", "prompt", "alpaca", "preference"] = HfArg(
        default="auto", help="Shape of the records: text, a kind of conversation, or pairs. auto: by their columns."
    )
    chat_template: str | None = HfArg(
        default=None, help="File with a chat template (Jinja), instead of the tokenizer's own."
    )
    max_targetless_fraction: float = HfArg(
        default=0.1, help="Share of conversations that may be left out because no token of them would be learned."
    )
    show_examples: int = HfArg(
        default=0, help="Training rows to print before the first step, with what is learned told apart in color."
    )
    preprocessing_num_workers: int | None = HfArg(
        default=None, help="Processes that tokenize. None: one for each core that this process may use."
    )
    data_cache_dir: str = HfArg(
        default="~/.cache/raw-trainer", help="Where tokenized data, references of dpo and the embedded tokenizer are."
    )
    dataloader_num_workers: int = HfArg(default=2, help="Processes per rank that prepare micro-batches.")
    dataloader_prefetch_factor: int = HfArg(default=2, help="Micro-batches that each of them keeps ready.")

    # The global batch
    per_device_train_batch_size: int = HfArg(default=8, help="Rows in one micro-batch of one rank.")
    per_device_eval_batch_size: int = HfArg(default=8, help="The same, in evaluation.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Micro-batches of one rank in one optimizer step.")
    global_batch_size: int | None = HfArg(
        default=None, help="Rows in one optimizer step of all ranks; the accumulation follows from it."
    )

    # What it minimizes
    objective: Literal["sft", "dpo"] = HfArg(
        default="sft", help="sft: the next token. dpo: to prefer the chosen answer of a pair to the rejected one."
    )
    dpo_beta: float = HfArg(
        default=0.1, help="dpo: how strongly the model is held to the one it began as; the lower, the less."
    )

    # The optimizer and its schedule
    optim: Literal["adamw_torch_fused", "muon"] = HfArg(
        default="adamw_torch_fused",
        help="muon: the matrices of the decoder layers by Muon, one moment each, scaled so that a learning_rate and "
        "weight_decay for AdamW fit; all else by AdamW.",
    )
    learning_rate: float = HfArg(default=5e-5, help="Highest learning rate, reached after the warmup.")
    scale_learning_rate: Literal["none", "sqrt", "linear"] = HfArg(
        default="none", help="Multiply learning_rate by global batch / reference_batch_size, or by the root of that."
    )
    reference_batch_size: int | None = HfArg(
        default=None, help="Rows in the global batch that learning_rate is meant for, with scale_learning_rate."
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
    ] = HfArg(
        default="linear",
        help="How the rate falls after the warmup: to 0 for linear and cosine. constant: no warmup. The names that "
        "begin with Warmup are DeepSpeed's.",
    )
    lr_scheduler_kwargs: str | None = HfArg(
        default=None,
        help="JSON, for a schedule of DeepSpeed: warmup_type (log or linear), warmup_min_lr; total_num_steps for "
        "WarmupDecayLR and WarmupCosineLR; for the latter warmup_min_ratio and cos_min_ratio, not warmup_min_lr.",
    )
    warmup_steps: float = HfArg(default=0.0, help="Steps of linear warmup; below 1, a share of all steps.")
    weight_decay: float = HfArg(default=0.0, help="Decay of matrices; norms and biases never decay.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW: decay of the first moment.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW: decay of the second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW: added to the denominator.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are scaled down to this norm. 0: never.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the training rows.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps; above 0 it wins over num_train_epochs.")
    max_skipped_steps: int = HfArg(
        default=10, help="Steps in a row that may be skipped because their gradient is not finite or has no target."
    )

    # How it is computed
    strategy: Literal["ddp", "fsdp"] = HfArg(
        default="ddp", help="ddp: every rank holds the whole model. fsdp: parameters and moments are sharded."
    )
    reshard_after_forward: bool = HfArg(
        default=True,
        help="fsdp: free a layer's full parameters after its forward; costs two gathers a micro-step, not one a step.",
    )
    replicas: int = HfArg(
        default=1, help="fsdp: groups of ranks that each hold all shards; above 1, hybrid sharding on a 2-D mesh."
    )
    tensor_parallel: int = HfArg(
        default=1, help="fsdp: ranks next to each other that divide each layer, and read the same rows."
    )
    context_parallel: int = HfArg(
        default=1,
        help="Ranks next to each other that divide each row: one has 1 / N of its positions, and for attention all of "
        "them of 1 / N of the heads. For rows that are too long for one GPU.",
    )
    sync_each_batch: bool = HfArg(
        default=False,
        help="fsdp: exchange gradients in each micro-step, so that a rank keeps its shard of them alone. Costs a "
        "reduce-scatter a micro-step. Without, it is one a step, and each rank holds them whole until then, in fp32.",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = HfArg(
        default="float32",
        help="fsdp: of gradients while they are reduced over ranks. bfloat16 halves what travels, and rounds each sum.",
    )
    cpu_offload: bool = HfArg(
        default=False,
        help="fsdp: parameters, gradients and moments lie in host memory, where AdamW runs, too; a GPU holds what it "
        "computes. Costs a copy of each layer to the GPU for each use of it, and one of its gradients back. torchrun "
        "gives AdamW one CPU thread a rank, unless OMP_NUM_THREADS is set.",
    )
    shard_optimizer: bool = HfArg(
        default=False, help="ddp: each rank updates its part of the parameters, and keeps only that part's moments."
    )
    bf16: bool = HfArg(
        default=torch.cuda.is_available(), help="Compute in bf16 over fp32 parameters. The default is: on a GPU."
    )
    bf16_residual: bool = HfArg(
        default=False,
        help="With bf16: what a layer is given, and adds to, is bf16, too, as it is with fsdp in any case. Faster, "
        "less is kept, and each sum is rounded.",
    )
    float8: bool = HfArg(
        default=False,
        help="With bf16: matrix products of the decoder layers in float8, scaled per tensor (model/float8.py), not "
        "those of the head. Faster with torch_compile, for wide models, on a GPU of compute capability 8.9 or more.",
    )
    torch_compile: bool = HfArg(
        default=torch.cuda.is_available(),
        help="Compile each layer, in the first step. The default is: on a GPU, if Triton and a C compiler are there.",
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="Keep only each layer's input for the backward and compute the rest again."
    )
    offload_activations: bool = HfArg(
        default=False,
        help="With gradient_checkpointing: keep those inputs in page-locked host memory. Costs a copy of each to the "
        "host and one back, on the stream that computes.",
    )
    activation_memory_budget: float | None = HfArg(
        default=None,
        help="With torch_compile: the share of a layer's activations, 0 to 1, that is kept for its backward; the "
        "cheapest to compute again are not. Costs what they cost: nothing at 1, a second forward at 0. Not for a model "
        "with dropout or other noise.",
    )
    ddp_backend: Literal["nccl", "gloo"] | None = HfArg(
        default=None, help="None: gloo for CPU tensors and nccl for GPU tensors. gloo lets ranks share one GPU."
    )
    ddp_timeout: int = HfArg(default=1800, help="Seconds after which a collective is given up.")
    full_determinism: bool = HfArg(
        default=False, help="Only algorithms that pass the same bits each time; slower on a GPU."
    )
    seed: int = HfArg(default=42, help="Seed of initialization, data order and dropout.")

    deepspeed: str | None = HfArg(
        default=None,
        help="A DeepSpeed file, read natively (config/deepspeed.py): what it asks for, instead of options here.",
    )

    # What it writes, and when
    output_dir: str = HfArg(default="output", help="Directory of checkpoints, metrics and the final model.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Replace the run that output_dir holds, unless it is resumed."
    )
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="A checkpoint directory, or auto: the newest valid one of output_dir, if there is any."
    )
    logging_steps: int = HfArg(default=10, help="Steps between two rows of metrics.jsonl.")
    eval_steps: int = HfArg(default=0, help="Steps between evaluations. 0: only before and after training.")
    save_steps: int = HfArg(default=500, help="Steps between checkpoints. 0: only after training.")
    async_save: bool = HfArg(default=True, help="Train on while a checkpoint is written, from a copy in host memory.")
    save_dtype: Literal["bfloat16", "float32"] = HfArg(
        default="bfloat16", help="Of the finished model's files; checkpoints are always fp32."
    )
    save_total_limit: int | None = HfArg(default=None, help="Checkpoints that are kept, the newest. None: all.")
    ledger: bool = HfArg(
        default=False, help="Record the rows of every step and their tokens; `python -m data.ledger` checks them."
    )
    report_to: Literal["none", "tensorboard"] = HfArg(default="none", help="Where else metrics go.")
    trace_steps: int = HfArg(
        default=0, help="Steps, after two others, of which rank 0 writes a profiler trace and counts the collectives."
    )
    prompt: str | None = HfArg(default=None, help="Text that the trained model completes at the end.")

    @property
    def model_parallel_size(self) -> int:
        """Consecutive ranks that read the same sequences, because they split each layer or each sequence."""
        return self.tensor_parallel * self.context_parallel
