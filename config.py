"""Every option of the trainer: its name, default, help and check.

Names and meanings are those of transformers' `TrainingArguments` and of `run_clm.py`; the few new ones are `strategy`,
`reshard_after_forward`, `replicas`, `tensor_parallel`, `context_parallel`, `cpu_offload`, `sync_each_batch`,
`reduce_dtype`, `shard_optimizer`, `offload_activations`, `activation_memory_budget`, `global_batch_size`,
`train_mixture`, `packing`, `text_column`, `data_format`, `chat_template`, `max_targetless_share`, `show_examples`,
`data_cache_dir`, `max_skipped_steps`, `bf16_residual`, `float8`, `async_save`, `save_dtype`, `objective`, `dpo_beta`,
`ledger`, `trace_steps`, `scale_learning_rate`, `reference_batch_size` and `prompt`.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

# What the options become when no model is named: a small model that two CPU cores train in a few minutes. An option
# that the user gives wins over this table.
EMBEDDED_RECIPE: dict[str, Any] = {
    "block_size": 128,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "dataloader_num_workers": 0,
    "learning_rate": 6e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "adam_beta2": 0.99,
    "max_steps": 2000,
    "eval_steps": 1000,
    "save_steps": 1000,
    "save_total_limit": 2,
    "validation_split_percentage": 4,
    "prompt": "def ",
}


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


# Options that may differ between hosts: paths, of which the content must be the same, and what concerns one alone.
OF_A_HOST = {
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


class OptionError(ValueError):
    """What a user can get wrong. Its text names the option, the value and the remedy in at most three lines."""


def first_line(error: Exception) -> str:
    """What an exception has to say, short enough for such a text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
        help="Read and tokenise the training data while training: for sets that do not fit on a disk. No row-wise "
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
        default=None, help="File with a chat template (Jinja), in the place of the tokenizer's own."
    )
    max_targetless_share: float = HfArg(
        default=0.1, help="Share of conversations that may be left out because no token of them would be learned."
    )
    show_examples: int = HfArg(
        default=0, help="Training rows to print before the first step, with what is learned told apart in colour."
    )
    preprocessing_num_workers: int | None = HfArg(
        default=None, help="Processes that tokenise. None: one for each core that this process may use."
    )
    data_cache_dir: str = HfArg(
        default="~/.cache/raw-trainer", help="Where tokenised data, references of dpo and the embedded tokenizer are."
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

    # What it minimises
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
    lr_scheduler_type: Literal["linear", "cosine", "constant", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"] = HfArg(
        default="linear",
        help="How the rate falls after the warmup: to 0 for linear and cosine. Those named Warmup are DeepSpeed's.",
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
        default=False, help="Only algorithms that give the same bits each time; slower on a GPU."
    )
    seed: int = HfArg(default=42, help="Seed of initialisation, data order and dropout.")

    deepspeed: str | None = HfArg(
        default=None,
        help="A DeepSpeed file, read natively (compare/deepspeed.py): what it asks for, in the place of options here.",
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
    def ranks_a_row(self) -> int:
        """How many ranks, next to each other, read the same rows, because they divide each layer or each row."""
        return self.tensor_parallel * self.context_parallel

    @property
    def copies_weights(self) -> bool:
        """Whether layers multiply with bf16 copies of their weights (model/linear.py): not where memory is to be saved.

        Nor where parameters are sharded, and so are cast as they are gathered.
        """
        saves_memory = self.gradient_checkpointing or self.activation_memory_budget is not None
        return self.bf16 and self.strategy == "ddp" and not self.float8 and not saves_memory


class _Parser(HfArgumentParser):
    """argparse that raises what it has to say instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}\n`python train.py --help` lists every option")


def parse(argv: list[str], world_size: int | None = None, **defaults: Any) -> Options:
    """Read options from `argv`: `--name value` pairs, after an optional run.json or run.yaml.

    An option on the command line wins over the file, and both win over `EMBEDDED_RECIPE` and other `defaults`. What a
    DeepSpeed file says is read and printed here, too; who trains on it gives the `world_size`.
    Raises OptionError for an unknown option, a value of the wrong type or an unreadable file.
    """
    parser = _Parser(Options, prog="train.py", allow_abbrev=False)
    if argv and not argv[0].startswith("-"):
        argv = _read_run_file(argv[0]) + argv[1:]
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    parser.set_defaults(**defaults)
    if not given & {"model_name_or_path", "config_name"}:
        recipe = dict(EMBEDDED_RECIPE)
        if "num_train_epochs" in given:
            del recipe["max_steps"]  # it would win over what the user asked for
        parser.set_defaults(**recipe)
    options, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(Options)], n=1)
        hint = f"did you mean --{close[0]}?" if close else "`python train.py --help` lists every option"
        raise OptionError(f"{unknown[0]}: unknown option; {hint}")
    if options.deepspeed:
        import compare.deepspeed  # only here: it knows another trainer, and this one does without

        table = compare.deepspeed.read(options, {name.removeprefix("no_") for name in given}, world_size)
        if os.environ.get("RANK", "0") == "0":
            print(table, flush=True)
    return options


def _read_run_file(name: str) -> list[str]:
    """The options of a .json or .yaml file as command-line words, so that both go through the same checks."""
    path = Path(name)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise OptionError(f"{name}: not an option and not a .json or .yaml file of options")
    try:
        text = path.read_text()
        # BaseLoader keeps every YAML scalar a string: 1e-4 would otherwise not be read as a number.
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"{name}: cannot be read as a file of options: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{name}: must hold one mapping from option to value, as in learning_rate: 1e-4")
    return [f"--{key}={value}" for key, value in values.items() if value not in (None, "null")]


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
    if options.lr_scheduler_kwargs is not None:
        _check_schedule(options, options.lr_scheduler_kwargs)
    if options.max_steps <= 0 and options.num_train_epochs <= 0:
        raise OptionError(f"num_train_epochs {options.num_train_epochs}: give more than 0, or max_steps")
    if options.model_name_or_path and options.config_name:
        raise OptionError("model_name_or_path and config_name: give one; config_name means random weights")
    model = options.model_name_or_path or options.config_name
    if model and Path(model).resolve() == Path(options.output_dir).resolve():
        raise OptionError(f"output_dir {options.output_dir}: it is the model's own directory; give another one")
    _check_strategy(options, world_size)
    if options.bf16_residual and not options.bf16:
        raise OptionError("bf16_residual true: it needs --bf16 true")
    if options.float8 and (options.tensor_parallel > 1 or not options.bf16):
        needs = "is for whole layers; leave out one of it and tensor_parallel" if options.bf16 else "needs --bf16 true"
        raise OptionError(f"float8 true: it {needs}")
    world_size //= options.ranks_a_row  # from here on, what reads rows of its own: a group of ranks, or one
    if options.objective == "dpo" and options.packing:
        raise OptionError(f"packing {options.packing}: with --objective dpo, a row is a pair; leave it out")
    if not options.dpo_beta > 0:
        raise OptionError(
            f"dpo_beta {options.dpo_beta}: give more than 0; 0.1 is usual, and more keeps the model nearer"
        )
    if options.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise OptionError("report_to tensorboard: it is not installed here; pip install tensorboard, or give none")
    local_ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < local_ranks and options.ddp_backend != "gloo":
        raise OptionError(
            f"--nproc_per_node {local_ranks}: this host has {gpus} GPUs\ngive at most that many, or let ranks share a "
            "GPU with --ddp_backend gloo"
        )
    if options.ddp_backend == "nccl" and not torch.cuda.is_available():
        raise OptionError("ddp_backend nccl: there is no GPU here; give gloo, or leave it out")
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
            "give both or neither"
        )
    rows = options.per_device_train_batch_size * options.gradient_accumulation_steps * world_size
    options.learning_rate *= rate_factor(options, rows)


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
        raise OptionError(f"context_parallel {options.context_parallel}: not together with {name}; leave out one")
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
            f"offload_activations true: not together with tensor_parallel {options.tensor_parallel}; leave it out"
        )
    if options.optim == "muon" and (options.tensor_parallel > 1 or options.cpu_offload):
        name = f"tensor_parallel {options.tensor_parallel}" if options.tensor_parallel > 1 else "cpu_offload true"
        raise OptionError(
            f"optim muon: not with {name}: it needs each matrix whole, on a GPU\n"
            "leave that out, or give --optim adamw_torch_fused"
        )
    world_size //= options.tensor_parallel
    if world_size % options.replicas:
        sharing = readers(dataclasses.replace(options, context_parallel=1), world_size)
        raise OptionError(
            f"replicas {options.replicas}: {sharing} are "
            f"{world_size / options.replicas:.3g} for each replica\ngive a divisor of their number"
        )
    if options.shard_optimizer and options.strategy != "ddp":
        raise OptionError("shard_optimizer true: fsdp shards the optimizer in any case; leave it out")
    if options.cpu_offload and options.strategy != "fsdp":
        raise OptionError(
            "cpu_offload true: ddp keeps all of the model on the GPU; give --strategy fsdp, or leave it out"
        )
    if not options.reshard_after_forward and options.strategy != "fsdp":
        raise OptionError(
            "reshard_after_forward false: ddp shards no parameters; give --strategy fsdp, or leave it out"
        )
    if options.sync_each_batch and options.strategy != "fsdp":
        raise OptionError("sync_each_batch true: ddp keeps whole gradients in any case; leave it out")
    if options.reduce_dtype != "float32" and options.strategy != "fsdp":
        raise OptionError(f"reduce_dtype {options.reduce_dtype}: ddp reduces in fp32; give --strategy fsdp")
    if options.offload_activations and not options.gradient_checkpointing:
        raise OptionError("offload_activations true: it is the inputs that --gradient_checkpointing keeps; give both")


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
        raise OptionError(f"{name}: give a share from 0 to 1")
    if not options.torch_compile:
        raise OptionError(f"{name}: the compiler chooses what is kept; give --torch_compile, or leave it out")
    if options.gradient_checkpointing:
        raise OptionError(f"{name}: with gradient_checkpointing, only a layer's input is kept anyway; give one of them")


def check_data(options: Options) -> None:
    """Refuse what cannot work of the options that say what the rows are. Raises OptionError."""
    _at_least(options, "block_size", 2)
    _at_least(options, "preprocessing_num_workers", 1)
    _at_least(options, "max_targetless_share", 0)
    if not 0 <= options.validation_split_percentage < 100:
        raise OptionError(f"validation_split_percentage {options.validation_split_percentage}: give 0 to 99")
    sources = [name for name in ("train_file", "train_mixture", "dataset_name") if getattr(options, name)]
    if len(sources) > 1:
        raise OptionError(f"{' and '.join(sources)}: give one")
    if options.validation_file and not {"train_file", "train_mixture"} & set(sources):
        raise OptionError(f"validation_file {options.validation_file}: needs a train_file or train_mixture beside it")
    if options.streaming and options.max_steps <= 0:
        raise OptionError("streaming true: the number of rows is not known beforehand; give --max_steps")
    if options.streaming and sources not in (["train_file"], ["dataset_name"]):
        raise OptionError("streaming true: give --train_file or --dataset_name; only these can be streamed")
    if options.streaming and options.objective == "dpo":
        raise OptionError("streaming true: not with --objective dpo, which needs a reference of all pairs beforehand")
    if options.train_mixture:
        mixture(options.train_mixture)


def mixture(value: str) -> dict[str, float]:
    """The weight of each source that --train_mixture names, divided by their sum. Raises OptionError."""
    weights: dict[str, float] = {}
    for part in value.split(","):
        name, _, weight = part.rpartition("=")
        try:
            weights[name] = float(weight)
            wrong = not name or not 0 < weights[name] < math.inf
        except ValueError:
            wrong = True
        if wrong:
            raise OptionError(
                f"train_mixture {part}: give NAME=WEIGHT with a weight above 0, as in a.jsonl=0.7,b.jsonl=0.3"
            )
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def mesh_shape(options: Options, world_size: int) -> tuple[int, int, int]:
    """The ranks as a grid: replicas of the model x ranks that shard each of them x ranks that divide each layer."""
    replicas = world_size if options.strategy == "ddp" else options.replicas
    return replicas, world_size // replicas // options.tensor_parallel, options.tensor_parallel


def readers(options: Options, number: int) -> str:
    """Those who read rows of their own, in words: ranks, or groups of ranks that divide each layer or row."""
    if options.ranks_a_row == 1:
        return f"{number} ranks"
    return f"{number} group{'' if number == 1 else 's'} of {options.ranks_a_row} ranks"


def derive_accumulation(options: Options, world_size: int) -> None:
    """Set the accumulation that gives `global_batch_size` rows; an OptionError shows an impossible division.

    `world_size` is the number of those that read rows of their own: see `readers`.
    """
    assert options.global_batch_size
    micro_batch = options.per_device_train_batch_size
    accumulation, rest = divmod(options.global_batch_size, micro_batch * world_size)
    if rest or not accumulation:
        raise OptionError(
            f"global_batch_size {options.global_batch_size}: not a multiple of per_device_train_batch_size "
            f"{micro_batch} x {readers(options, world_size)} = {micro_batch * world_size} rows; "
            f"{options.global_batch_size} / {micro_batch * world_size} = "
            f"{options.global_batch_size / (micro_batch * world_size):.3g} micro-steps\n"
            "change global_batch_size, per_device_train_batch_size or the number of ranks"
        )
    options.gradient_accumulation_steps = accumulation


def rate_factor(options: Options, rows: int) -> float:
    """What the learning rate is multiplied by for a global batch of `rows`, where it is meant for another.

    In proportion to the batch (Goyal et al. 2017), or to its root, as the noise of a gradient falls (Malladi et al.
    2022, for Adam). Without `scale_learning_rate`, 1.
    """
    ratio = rows / (options.reference_batch_size or rows)
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[options.scale_learning_rate]


def check_skipped(options: Options, step: int, skipped_in_a_row: int) -> None:
    """Raises OptionError when training does not get on any more. All ranks have counted the same."""
    if skipped_in_a_row > options.max_skipped_steps:
        raise OptionError(
            f"max_skipped_steps {options.max_skipped_steps}: up to step {step}, {skipped_in_a_row} steps in a row had "
            "no usable gradient (see loss and grad_norm in metrics.jsonl)\nresume from an earlier checkpoint with a "
            f"lower --learning_rate than {options.learning_rate}, or look for rows without targets"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: how many rows, micro-batches and steps."""

    block_size: int  # tokens in a row
    accumulation: int  # micro-batches of one rank in a step
    global_batch_size: int  # rows of all ranks in a step
    steps_per_epoch: int  # whole global batches among the training rows; 0: not known of a stream
    total_steps: int


def plan(options: Options, rows: int, world_size: int) -> Plan:
    """The plan for `rows` training rows. Raises OptionError if they do not fill one global batch."""
    assert options.block_size
    world_size //= options.ranks_a_row
    accumulation = options.gradient_accumulation_steps
    global_batch_size = options.per_device_train_batch_size * accumulation * world_size
    if options.streaming:
        return Plan(options.block_size, accumulation, global_batch_size, 0, options.max_steps)
    steps_per_epoch = rows // global_batch_size
    if steps_per_epoch == 0:
        raise OptionError(
            f"global batch of {global_batch_size} rows = per_device_train_batch_size "
            f"{options.per_device_train_batch_size} x {accumulation} micro-steps x {readers(options, world_size)}: the "
            f"training split has only {rows} rows of block_size {options.block_size}\n"
            "give more text, or a smaller batch"
        )
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * steps_per_epoch)
    return Plan(options.block_size, accumulation, global_batch_size, steps_per_epoch, steps)


def _at_least(options: Options, name: str, least: float) -> None:
    value = getattr(options, name)
    if value is not None and not value >= least:  # so that NaN is refused too
        raise OptionError(f"{name} {value}: must be at least {least}")
