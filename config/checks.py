"""The checks of options: what cannot work is refused before anything is started."""

import dataclasses
import getpass
import importlib.util
import math
import netrc
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import torch

from config.errors import OptionError, install
from config.gpus import BF16, TRITON, lacking
from config.options import EPOCH, INTERVALS, TRACKERS, Options
from config.plan import data_parallel_groups, derive_accumulation, learning_rate_factor, mixture_weights
from config.schedule import check_schedule
from config.text import load_json
from config.validation import check_metric

POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "reference_batch_size",
    "replicas",
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "save_total_limit",
    "ddp_timeout",
    "dataloader_prefetch_factor",
    "early_stopping_patience",
    "lora_r",
)

NOT_NEGATIVE = (
    "seed",
    "router_bias_update_rate",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "max_skipped_steps",
    "show_examples",
    "trace_steps",
    "dataloader_num_workers",
    "early_stopping_threshold",
)

# Options of adapters only.
ADAPTERS_ONLY = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "merge_lora")

# What adapters cannot be combined with, and why.
WITHOUT_ADAPTERS = {
    "tensor_parallel": "adapters are not split",
    "expert_parallel": "frozen experts need no gradients; fsdp shards them",
    "float8": "it is for linear modules without adapters",
    "optim": "Muon's update is for full matrices, not for their factors",
    "router_bias_update_rate": "it would change the frozen model, and only adapters are saved",
}

# Options for FSDP only, and why DDP cannot have them.
FSDP_ONLY = {
    "tensor_parallel": "needs --strategy fsdp (in a DeepSpeed file: zero_optimization.stage 2 or 3)",
    "expert_parallel": "ddp has the full model on each GPU",
    "replicas": "needs --strategy fsdp (in a DeepSpeed file: zero_optimization.stage 2 or 3)",
    "cpu_offload": "ddp has the full model on the GPU",
    "reshard_after_forward": "ddp shards no parameters",
    "sync_each_batch": "ddp has full gradients in any case",
    "reduce_dtype": "ddp reduces gradients in fp32",
}


def check(options: Options, world_size: int) -> None:
    """Refuse what cannot work, derive `gradient_accumulation_steps` from `global_batch_size`, scale `learning_rate`.

    `world_size` is the number of ranks. Needs no process group. Raises OptionError.
    """
    for name in POSITIVE:
        _at_least(options, name, 1)
    for name in NOT_NEGATIVE:
        _at_least(options, name, 0)
    if options.logging_steps == 0:
        raise OptionError("logging_steps 0: pass at least 1, a fraction of all steps, or epoch")
    check_data(options)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(options, name) < 1:
            raise OptionError(f"{name} {getattr(options, name)}: must be at least 0 and below 1")
    if options.max_steps <= 0 and options.num_train_epochs < 0:
        raise OptionError(
            f"num_train_epochs {options.num_train_epochs}: pass more than 0, or 0 to evaluate only, or --max_steps"
        )
    if options.evaluates_only and options.prompt:
        raise OptionError(
            f"prompt {options.prompt}: num_train_epochs 0 writes no model to complete it\nremove --prompt"
        )
    _check_model_and_objective(options)
    _check_adapters(options)
    _check_strategy(options)
    _check_parallel(options, world_size)
    _check_precision(options)
    _check_machine(options)
    data_parallel_size = world_size // options.model_parallel_size
    if options.global_batch_size:
        derive_accumulation(options, data_parallel_size)
    if (options.scale_learning_rate == "none") != (options.reference_batch_size is None):
        raise OptionError(
            f"scale_learning_rate {options.scale_learning_rate}, reference_batch_size {options.reference_batch_size}: "
            "pass both or neither"
        )
    micro_batch, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    options.learning_rate *= learning_rate_factor(options, micro_batch * accumulation * data_parallel_size)
    check_schedule(options)


def check_urls(option: str, value: str, streamed: bool) -> None:
    """Refuse URLs that are not streamed, or that hold credentials. Raises OptionError, without the credentials."""
    for url in re.findall(r"[a-zA-Z0-9+.-]+://[^,]*", value):
        scheme, _, rest = url.partition("://")
        shown = f"{option} {scheme}://{re.split('[?#]', rest)[0].rpartition('@')[2]}"
        if "@" in rest.partition("/")[0] or "?" in rest:
            raise OptionError(
                f"{shown}: a URL with a user or a query may hold credentials, and it would be printed and saved\n"
                "pass it without them, and set the credentials in the environment, such as AWS_PROFILE or HF_TOKEN"
            )
        if not streamed:
            remedy = "add --streaming --max_steps N, or download it" if option != "validation_file" else "download it"
            raise OptionError(f"{shown}: prepared data is made of files on a disk, not behind a URL\n{remedy}")


def check_data(options: Options) -> None:
    """Refuse what cannot work of the options for data and sequences. Raises OptionError."""
    _at_least(options, "block_size", 2)
    _at_least(options, "preprocessing_num_workers", 1)
    _at_least(options, "max_record_bytes", 1)
    _at_least(options, "max_targetless_fraction", 0)
    if not 0 <= options.validation_split_percentage < 100:
        raise OptionError(f"validation_split_percentage {options.validation_split_percentage}: pass 0 to 99")
    sources = [name for name in ("train_file", "train_mixture", "dataset_name", "dataset") if getattr(options, name)]
    if len(sources) > 1:
        first, second = (f"{name} {getattr(options, name)}" for name in sources[:2])
        raise OptionError(f"{first}: cannot be combined with {second}\nremove one of them")
    if options.dataset and not options.dataset_info and not Path("data/dataset_info.json").exists():
        raise OptionError(
            f"dataset {options.dataset}: pass --dataset_info FILE, which has this name; or pass files by --train_file, "
            "and a hub id by --dataset_name"
        )
    if options.dataset_info and not options.dataset:
        raise OptionError(f"dataset_info {options.dataset_info}: pass --dataset NAME, a data set that it names")
    trained_on = {"train_file", "train_mixture", "dataset"} & set(sources)
    if options.validation_file and not trained_on and (sources or not options.evaluates_only):
        raise OptionError(f"validation_file {options.validation_file}: pass --train_file or --train_mixture, too")
    if options.streaming and options.max_steps <= 0:
        raise OptionError("streaming true: the number of sequences is not known before the run; pass --max_steps")
    for name in INTERVALS if options.streaming else ():
        if getattr(options, name) == EPOCH:
            raise OptionError(f"{name} epoch: a stream has no epochs; pass a number of steps")
    if options.streaming and not sources:
        raise OptionError("streaming true: pass what to stream: --train_file, --train_mixture or --dataset_name")
    if options.streaming and "," in (options.dataset or ""):
        raise OptionError(
            f"streaming true: one data set can be streamed, not {options.dataset}\npass one name, or the files of all "
            "with weights, because a stream does not know their sizes: --train_mixture a.jsonl=0.7,b.jsonl=0.3"
        )
    if options.streaming and options.objective == "dpo":
        raise OptionError(
            "streaming true: cannot be combined with objective dpo, which evaluates all pairs before the run\n"
            "remove --streaming"
        )
    if options.train_mixture:
        mixture_weights(options.train_mixture)
    for name in ("train_file", "train_mixture", "validation_file"):
        check_urls(name, getattr(options, name) or "", options.streaming and name != "validation_file")
    if options.chat_template_kwargs is not None:
        try:
            variables = load_json(options.chat_template_kwargs)
        except ValueError:
            variables = None
        if not isinstance(variables, dict):
            raise OptionError(
                f"chat_template_kwargs {options.chat_template_kwargs}: pass a JSON mapping, as "
                "'{\"enable_thinking\": false}'"
            )
    check_metric(options)


def check_skipped(options: Options, step: int, skipped_in_a_row: int) -> None:
    """Raise OptionError if too many consecutive steps were skipped. The counts are equal on all ranks."""
    if skipped_in_a_row > options.max_skipped_steps:
        raise OptionError(
            f"max_skipped_steps {options.max_skipped_steps}: up to step {step}, {skipped_in_a_row} steps in a row had "
            "no usable gradient (see loss and grad_norm in metrics.jsonl)\nresume from an earlier checkpoint with a "
            f"lower --learning_rate than {options.learning_rate}, or look for sequences without targets\n"
            "find the step and its sequences: docs/troubleshooting.md#nan-and-skipped-steps"
        )


def _check_model_and_objective(options: Options) -> None:
    if options.model_name_or_path and options.config_name:
        raise OptionError(
            f"model_name_or_path {options.model_name_or_path}: cannot be combined with config_name "
            f"{options.config_name}\nremove one of them; config_name means random weights"
        )
    model = options.model_name_or_path or options.config_name
    if model and Path(model).resolve() == Path(options.output_dir).resolve():
        raise OptionError(f"output_dir {options.output_dir}: it is the model's own directory; pass another one")
    if options.objective == "dpo" and options.packing:
        raise OptionError(
            f"packing {options.packing}: cannot be combined with objective dpo, where a sequence is a pair\n"
            "remove --packing"
        )
    if not options.dpo_beta > 0:
        raise OptionError(
            f"dpo_beta {options.dpo_beta}: pass more than 0; 0.1 is usual, and more holds the model closer to its start"
        )


def _check_adapters(options: Options) -> None:
    if not options.use_peft:
        for name in ADAPTERS_ONLY:
            if (value := getattr(options, name)) != getattr(Options, name):
                raise OptionError(
                    f"{name} {str(value).lower()}: all parameters are trained\npass --use_peft, or remove --{name}"
                )
        return
    if not options.model_name_or_path:
        raise OptionError("use_peft true: adapters belong to a model with trained weights\npass --model_name_or_path")
    if not 0 <= options.lora_dropout < 1:
        raise OptionError(f"lora_dropout {options.lora_dropout}: must be at least 0 and below 1")
    if not 0 < options.lora_alpha < math.inf:
        raise OptionError(f"lora_alpha {options.lora_alpha}: must be above 0")
    for name, why in WITHOUT_ADAPTERS.items():
        if (value := getattr(options, name)) != getattr(Options, name):
            raise OptionError(
                f"use_peft true: cannot be combined with {name} {str(value).lower()}: {why}\nremove one of them"
            )


def _check_strategy(options: Options) -> None:
    for name, why in FSDP_ONLY.items():
        value = getattr(options, name)
        if options.strategy != "fsdp" and value != getattr(Options, name):
            raise OptionError(f"{name} {str(value).lower()}: {why}\npass --strategy fsdp, or remove --{name}")
    if options.shard_optimizer and options.strategy != "ddp":
        raise OptionError("shard_optimizer true: fsdp shards the optimizer in any case; remove --shard_optimizer")
    if options.offload_activations and not options.gradient_checkpointing:
        raise OptionError(
            "offload_activations true: it offloads the inputs that gradient checkpointing saves\n"
            "pass --gradient_checkpointing, too"
        )


def _check_parallel(options: Options, world_size: int) -> None:
    """Refuse numbers of ranks that do not divide, and combinations that parallelism within a model does not have."""
    tensor, context = f"tensor_parallel {options.tensor_parallel}", f"context_parallel {options.context_parallel}"
    for name in ("context_parallel", "tensor_parallel", "expert_parallel"):
        size = getattr(options, name)
        if world_size % size:
            raise OptionError(
                f"{name} {size}: {world_size} ranks are {world_size / size:.3g} groups of {size}\n"
                "pass a divisor of the number of ranks"
            )
    if options.context_parallel > 1 and (options.tensor_parallel > 1 or options.objective == "dpo"):
        other = tensor if options.tensor_parallel > 1 else "objective dpo"
        raise OptionError(f"{context}: cannot be combined with {other}\nremove one of them")
    if options.tensor_parallel > 1 and options.ddp_backend == "gloo" and torch.cuda.is_available():
        raise OptionError(
            f"{tensor}: cannot be combined with ddp_backend gloo, which cannot gather GPU tensors within a layer\n"
            "remove --ddp_backend; each rank then needs a GPU of its own"
        )
    if options.tensor_parallel > 1 and options.offload_activations:
        raise OptionError(f"offload_activations true: cannot be combined with {tensor}\nremove one of them")
    if options.optim == "muon" and options.optim_state_dtype != "float32":
        raise OptionError(
            f"optim_state_dtype {options.optim_state_dtype}: cannot be combined with optim muon, whose state is fp32\n"
            "remove one of them"
        )
    if options.optim == "muon" and (options.tensor_parallel > 1 or options.cpu_offload):
        other = tensor if options.tensor_parallel > 1 else "cpu_offload true"
        raise OptionError(
            f"optim muon: cannot be combined with {other}, because Muon needs the full matrix on a GPU\n"
            f"remove --{other.split()[0]}, or pass --optim adamw_torch_fused"
        )
    if options.expert_parallel > 1:
        _check_expert_parallel(options)
    groups = world_size // options.tensor_parallel
    if groups % options.replicas:
        sharding = data_parallel_groups(dataclasses.replace(options, context_parallel=1), groups)
        raise OptionError(
            f"replicas {options.replicas}: {sharding} are {groups / options.replicas:.3g} for each replica\n"
            f"pass a divisor of {groups}"
        )


def _check_expert_parallel(options: Options) -> None:
    name = f"expert_parallel {options.expert_parallel}"
    for other in ("tensor_parallel", "context_parallel", "replicas", "cpu_offload"):
        value = getattr(options, other)
        if value != getattr(Options, other):
            raise OptionError(f"{name}: cannot be combined with {other} {str(value).lower()}\nremove one of them")
    if options.optim == "muon":
        raise OptionError(
            f"optim muon: cannot be combined with {name}, because Muon needs the full matrices of the experts\n"
            "remove --expert_parallel, or pass --optim adamw_torch_fused"
        )
    if options.ddp_backend == "gloo" and torch.cuda.is_available():
        raise OptionError(
            f"{name}: cannot be combined with ddp_backend gloo on GPUs\n"
            "remove --ddp_backend; each rank then needs a GPU of its own"
        )


def _check_precision(options: Options) -> None:
    for name in ("bf16_residual", "float8"):
        if getattr(options, name) and not options.bf16:
            raise OptionError(f"{name} true: needs bf16; pass --bf16 true, or remove --{name}")
    if options.float8 and options.tensor_parallel > 1:
        raise OptionError(
            f"float8 true: cannot be combined with tensor_parallel {options.tensor_parallel}\nremove one of them"
        )


def _check_machine(options: Options) -> None:
    """Refuse what this machine cannot do. Without a compiler, switch torch_compile off and say so."""
    if os.environ.get("RANK", "0") == "0":
        _check_trackers(options)
    if options.report and importlib.util.find_spec("matplotlib") is None:
        raise OptionError(f"report true: it needs matplotlib, which is not installed here\n{install('matplotlib')}")
    local_ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    # Under srun, or with CUDA_VISIBLE_DEVICES, the only GPU that a process sees may be its own: runtime/gpus.py.
    own = gpus == 1 and ("CUDA_VISIBLE_DEVICES" in os.environ or "TORCHELASTIC_RUN_ID" not in os.environ)
    if 0 < gpus < local_ranks and options.ddp_backend != "gloo" and not own:
        raise OptionError(
            f"--nproc_per_node {local_ranks}: the number of GPUs of this node is {gpus}\npass at most {gpus}, or let "
            "ranks share a GPU with --ddp_backend gloo"
        )
    if options.ddp_backend == "nccl" and not torch.cuda.is_available():
        raise OptionError(
            "ddp_backend nccl: there is no GPU here that torch can use; `make doctor` says what is here\n"
            "pass --ddp_backend gloo, or remove it"
        )
    if options.memory_snapshot and not torch.cuda.is_available():
        raise OptionError("memory_snapshot true: it records the memory of a GPU, and none is here\nremove it")
    if (gpu := lacking(BF16)) and os.environ.get("RANK", "0") == "0":
        chosen = "bf16 is emulated, and slow; pass --bf16 false" if options.bf16 else "fp32 is used, not bf16"
        print(f"bf16 {str(options.bf16).lower()}: {gpu} has no bf16 arithmetic: {chosen}", file=sys.stderr)
    missing = _missing_for_compilation() if options.torch_compile else None
    if missing:
        options.torch_compile = False
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"torch_compile: off, because {missing} is not here; training is slower", file=sys.stderr)
    if options.activation_memory_budget is not None:
        _check_memory_budget(options, options.activation_memory_budget)
    if options.torch_compile:
        _claim_compiler_cache()


def _check_trackers(options: Options) -> None:
    """Refuse trackers that are not installed, or do not know their user: they would ask amid the run."""
    missing = [name for name in options.trackers if importlib.util.find_spec(name) is None]
    if options.report_to == "all" and not options.trackers:
        missing = list(TRACKERS)
    if missing:
        raise OptionError(
            f"report_to {options.report_to}: {' and '.join(missing)} not installed here\n"
            f"{install(*missing)}, or pass --report_to none"
        )
    known: dict[str, Callable[[], bool]] = {"wandb": _wandb_knows_user, "swanlab": _swanlab_knows_user}
    for name in known.keys() & set(options.trackers):
        if not known[name]():
            raise OptionError(
                f"report_to {options.report_to}: {name} has no API key of a user\n"
                f"run `{name} login`, or set {name.upper()}_MODE=offline to keep its files here, or pass a --report_to "
                f"without {name}"
            )
    if options.logging_dir and not options.trackers:
        raise OptionError(
            f"logging_dir {options.logging_dir}: only trackers write there, and report_to is none\n"
            "pass --report_to tensorboard, or remove --logging_dir"
        )
    if options.logging_dir:
        try:
            Path(options.logging_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.logging_dir).close()
        except OSError as error:
            raise OptionError(
                f"logging_dir {options.logging_dir}: {error.strerror}\npass a directory that can be written"
            ) from error


def _wandb_knows_user() -> bool:
    """Whether wandb has an API key where it looks for one, or needs none. It would check a key over the network."""
    import wandb  # optional, not in requirements.txt

    if os.environ.get("WANDB_MODE", "online") != "online":
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _swanlab_knows_user() -> bool:
    import swanlab  # optional, not in requirements.txt

    settings = swanlab.Settings()
    return settings.mode != "online" or bool(settings.api_key)


def _claim_compiler_cache() -> None:
    """Create torch's directory of compiled code, or refuse another user's: torch unpickles and executes its files.

    The default is in /tmp, under a name that any user of the machine can take first.
    """
    try:
        default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    except (KeyError, OSError):  # a user without a name
        default = Path(tempfile.gettempdir()) / f"torchinductor_uid_{os.getuid()}"
    path = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default)))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise OptionError(
            f"torch_compile true: {path}: {error.strerror}\nset TORCHINDUCTOR_CACHE_DIR to a directory of yours"
        ) from error
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        raise OptionError(
            f"torch_compile true: other users can write to {path}, and so choose what torch executes\n"
            "set TORCHINDUCTOR_CACHE_DIR to a directory of yours"
        )


def _missing_for_compilation() -> str | None:
    """The tool that torch.compile needs and this machine does not have, or None."""
    if torch.cuda.is_available() and not importlib.util.find_spec("triton"):
        return "the package triton"
    if gpu := lacking(TRITON):
        return f"a GPU of compute capability 7.0, instead of {gpu},"
    return None if any(map(shutil.which, ("cc", "gcc", "clang", "g++"))) else "a C compiler"


def _check_memory_budget(options: Options, budget: float) -> None:
    name = f"activation_memory_budget {budget}"
    if not 0 <= budget <= 1:
        raise OptionError(f"{name}: pass a fraction from 0 to 1")
    if not options.torch_compile:
        raise OptionError(
            f"{name}: needs torch_compile, because the compiler decides what is saved\n"
            "pass --torch_compile true, or remove --activation_memory_budget"
        )
    if options.gradient_checkpointing:
        raise OptionError(
            f"{name}: cannot be combined with gradient_checkpointing, which saves a layer's input only\n"
            "remove one of them"
        )


def _at_least(options: Options, name: str, least: float) -> None:
    value = getattr(options, name)
    if value is not None and not value >= least:  # also refuses NaN
        raise OptionError(f"{name} {value}: must be at least {least}")
