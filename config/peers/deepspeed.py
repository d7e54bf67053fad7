"""A DeepSpeed file becomes options of this trainer: what each key of its JSON means here.

    python -m config FILE --ranks N [options of train.py]

prints the table that `train.py --deepspeed FILE` prints when it starts. DeepSpeed itself is not needed. Meanings and
defaults are those of DeepSpeed 0.19. A value of the file sets an option; a different value of that option on the
command line is an error. For a key that is absent or "auto", the option decides. A key that would change the numbers
and is not implemented is refused. A key that only moves work or memory has no effect, and its line says why. Every key
gets a line.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import OptionError
from config.options import DEEPSPEED_SCHEDULES, Options
from config.peers.deepspeed_keys import (
    ABSENT,
    ACTIVATIONS,
    ADAM,
    BATCH,
    BATCH_OPTIONS,
    DECIDING_OPTION,
    DIRECT,
    FP32_ACCUMULATION,
    OTHER_MODEL,
    RATES,
    REFUSED,
    UNKNOWN,
    ZERO,
    explain_unused,
    left_to_option,
    shown,
)
from config.plan import data_parallel_groups
from config.run_file import read_json
from config.text import read_text

LARGEST = 2.0**62  # of a number, so that products of some fit into a float


@dataclass
class DeepSpeedFile:
    """The values of a file by dotted key, the meaning of each key so far, and the options that they set."""

    name: str
    values: dict[str, Any]
    options: Options
    given: set[str]  # names of options that the user gave
    meanings: dict[str, str] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)  # meanings of keys that the file does not have

    def value(self, key: str) -> Any:
        """The value of a key, or None if the key is absent or "auto"."""
        value = self.values.get(key)
        return None if value == "auto" else value

    def number(self, key: str, kind: type = float, least: float = 0) -> Any:
        """The value of a key as a float, or as an int, which may be written as 2e8. Raises OptionError for others."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < LARGEST:
            raise self.error(key, f'pass a number of at least {least} and below {LARGEST:g}, or "auto"')
        if kind is int and value != int(value):
            raise self.error(key, 'pass a whole number, or "auto"')
        return kind(value)

    def switch(self, key: str) -> bool | None:
        """The value of a key as true or false. Raises OptionError for others."""
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, 'pass true, false or "auto"')
        return value

    def error(self, key: str, problem: str) -> OptionError:
        """An error that names the file, a key, its value and the problem with its remedy."""
        return OptionError(f"deepspeed {self.name}: {key} {json.dumps(self.values.get(key))}: {problem}")

    def set_option(self, key: str, option: str, value: Any) -> None:
        """Set an option because of a key. Raises OptionError if the user gave another value."""
        now = getattr(self.options, option)
        if option in self.given and now != value:
            raise OptionError(
                f"{option} {shown(now)}: {key} {json.dumps(self.values.get(key))} of {self.name} means {option} "
                f'{shown(value)}\nremove --{option}, or change the file; "auto" there lets the option decide'
            )
        setattr(self.options, option, value)
        self.explain(key, f"{option} {shown(value)}")

    def explain(self, key: str, text: str) -> None:
        """Add `text` to the meaning of a key."""
        texts = self.meanings if key in self.values else self.absent
        joint = " " if text.startswith("=") else ", "
        texts[key] = f"{texts[key]}{joint}{text}" if key in texts else text


def read_deepspeed_file(options: Options, given: set[str], world_size: int | None) -> str:
    """Set `options` to what the file `options.deepspeed` says. `given` are the names of options that the user gave.

    Returns the table of keys and their meanings. Without ranks, for the preparation of data, `world_size` is None, and
    the arithmetic of the batch is left out.
    Raises OptionError for a value that contradicts another one or an option, and for a key that is not implemented.
    """
    assert options.deepspeed
    file = DeepSpeedFile(options.deepspeed, _flatten(_load(options.deepspeed)), options, given)
    _refuse(file)
    for key, option in (
        ("tensor_parallel.autotp_size", "tensor_parallel"),
        ("sequence_parallel_size", "context_parallel"),
    ):
        if ranks := file.number(key, int):
            file.set_option(key, option, ranks)
    data_parallel_size = sharding_size = None
    if world_size is not None:  # config/checks.py refuses what is no whole number
        data_parallel_size = max(1, world_size // options.model_parallel_size)
        sharding_size = max(1, world_size // options.tensor_parallel)
    _batch(file, data_parallel_size)
    _optimizer(file)
    _scheduler(file)
    if "steps_per_print" in file.values:  # of DeepSpeed's own messages, not of a trainer's
        file.explain("steps_per_print", left_to_option(options, "logging_steps"))
    for key, (option, kind) in DIRECT.items():
        value = file.switch(key) if kind is bool else file.number(key, kind)
        if value is not None:
            file.set_option(key, option, value)
    _autocast(file)
    _zero(file, sharding_size)
    _dtypes(file)
    _activations(file)
    if file.switch("tensorboard.enabled"):
        file.set_option("tensorboard.enabled", "report_to", "tensorboard")
    for key in ABSENT:
        if key not in file.values and not (key == "bf16.enabled" and "bfloat16.enabled" in file.values):
            file.explain(key, left_to_option(options, DECIDING_OPTION[key]))
    return _table(file)


def _load(name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises OptionError if there is none, or if a key appears twice."""
    try:
        text = read_text(Path(name))
        try:
            values = read_json(text)
        except json.JSONDecodeError:
            values = read_json(without_comments(text))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"deepspeed {name}: {cause}; pass a JSON file as DeepSpeed reads it") from error
    return values


def without_comments(text: str) -> str:
    """JSON without comments (#, //, /* */) and without commas before a closing bracket, as Hjson has them.

    DeepSpeed reads its file as Hjson. Its other liberties, such as keys without quotes, are not accepted. Lines stay.
    """
    string, comment = r'"(?:\\.|[^"\\])*"', r"(?:#|//)[^\n]*|/\*.*?\*/"
    for pattern in (comment, r",(?=\s*[}\]])"):
        text = re.sub(
            f"({string})|{pattern}", lambda match: match[1] or "\n" * match[0].count("\n"), text, flags=re.DOTALL
        )
    return text


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key, in the order of the file."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _refuse(file: DeepSpeedFile) -> None:
    """Raise OptionError for a key that would change the numbers or the model, and is not implemented."""
    for key, value in file.values.items():
        why = REFUSED.get(key)
        if key.startswith(("compression_training.", "weight_quantization.")) and key.endswith("enabled"):
            why = OTHER_MODEL
        if why is None and (why := REFUSED.get(key.rpartition(".")[0])):  # a whole section
            raise file.error(key, why)
        if why is None or value in ("auto", "none", "mean"):
            continue
        is_size = key.endswith("_size")  # a size of 1 switches nothing on
        if value > is_size if isinstance(value, int | float) else value:
            raise file.error(key, why)


def _batch(file: DeepSpeedFile, data_parallel_size: int | None) -> None:
    """Set the batch options: train_batch_size = micro-batch x accumulation x ranks. A missing value is derived."""
    options = file.options
    known = {option for option in BATCH_OPTIONS if option in file.given}
    for key, option in zip(BATCH, BATCH_OPTIONS, strict=True):
        if (value := file.number(key, int, least=1)) is not None:
            file.set_option(key, option, value)
            known.add(option)
    if data_parallel_size is None:
        return
    batch, micro_batch, accumulation = (getattr(options, name) if name in known else None for name in BATCH_OPTIONS)
    if batch is None:
        micro_batch = micro_batch or options.per_device_train_batch_size
        accumulation = accumulation or options.gradient_accumulation_steps
        batch = micro_batch * accumulation * data_parallel_size
    elif micro_batch is None:
        accumulation = accumulation or 1
        micro_batch = batch / (accumulation * data_parallel_size)
    elif accumulation is None:
        accumulation = batch / (micro_batch * data_parallel_size)
    ranks, product = data_parallel_groups(options, data_parallel_size), micro_batch * accumulation * data_parallel_size
    whole = micro_batch == int(micro_batch) and accumulation == int(accumulation)
    if not whole or batch != product:
        raise OptionError(
            f"deepspeed {file.name}: train_batch_size {batch} {'is not' if whole else '='} "
            f"train_micro_batch_size_per_gpu {micro_batch:.4g} x gradient_accumulation_steps {accumulation:.4g} x "
            f"{ranks}{f' = {product:.6g}' if whole else ': not a whole number'}\n"
            'change one of them or the number of ranks, or write "auto" for the value to derive'
        )
    options.per_device_train_batch_size, options.gradient_accumulation_steps = int(micro_batch), int(accumulation)
    for key, option, value in zip(BATCH, BATCH_OPTIONS, (batch, micro_batch, accumulation), strict=True):
        if key not in file.meanings:
            file.explain(key, f"{option} {int(value)}")
    file.explain(BATCH[0], f"= micro-batch {micro_batch:.0f} x accumulation {accumulation:.0f} x {ranks}")


def _optimizer(file: DeepSpeedFile) -> None:
    """Set AdamW. DeepSpeed's Adam is AdamW, too, unless adam_w_mode is false."""
    kind = file.value("optimizer.type")
    if file.values.get(f"{ADAM}.betas") == "auto":
        file.explain(f"{ADAM}.betas", left_to_option(file.options, "adam_beta1", "adam_beta2"))
    if kind is not None:
        if str(kind).lower() not in ("adam", "adamw"):
            muon = "and pass --optim muon, which scales updates in another way than DeepSpeed's"
            remedy = muon if str(kind).lower() == "muon" else "or write AdamW"
            raise file.error("optimizer.type", f"a file can set AdamW only\nremove the section, {remedy}")
        file.set_option("optimizer.type", "optim", "adamw_torch_fused")
        file.explain("optimizer.type", "norms and biases never decay")
    betas = file.value(f"{ADAM}.betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(beta, float | int) for beta in betas):
            raise file.error(f"{ADAM}.betas", 'pass two numbers, or "auto"')
        file.set_option(f"{ADAM}.betas", "adam_beta1", betas[0])
        file.set_option(f"{ADAM}.betas", "adam_beta2", betas[1])
    if file.switch(f"{ADAM}.bias_correction") is False:
        raise file.error(f"{ADAM}.bias_correction", "AdamW corrects the bias; remove the key")
    decay = file.number(f"{ADAM}.weight_decay")
    decay = file.options.weight_decay if decay is None else decay
    if str(kind).lower() == "adam" and file.switch(f"{ADAM}.adam_w_mode") is False and decay:
        raise file.error(
            f"{ADAM}.adam_w_mode",
            f"Adam would add weight_decay {decay} to the gradient, which is not AdamW\n"
            "write weight_decay 0, with which Adam is AdamW, or adam_w_mode true",
        )


def _scheduler(file: DeepSpeedFile) -> None:
    """Set one of DeepSpeed's schedules, whose arithmetic is in optim/schedule.py."""
    kind = file.value("scheduler.type")
    if kind is None:
        for key in file.values:
            if key.startswith(f"{RATES}."):
                file.explain(key, f"no effect: {left_to_option(file.options, 'lr_scheduler_type')}")
        return
    if not isinstance(kind, str) or kind not in DEEPSPEED_SCHEDULES:
        raise file.error("scheduler.type", f"pass {', '.join(DEEPSPEED_SCHEDULES)}, or remove the section")
    file.set_option("scheduler.type", "lr_scheduler_type", kind)
    steps = f"{RATES}.warmup_num_steps"
    if steps not in file.values or file.value(steps) is not None:
        number = file.number(steps, int)
        file.set_option(steps, "warmup_steps", 1000 if number is None else number)
    # A highest rate of the schedule overrides the rate of the optimizer.
    highest = f"{RATES}.warmup_max_lr"
    if kind != "WarmupCosineLR" and (
        file.value(highest) is not None or (kind == "WarmupDecayLR" and highest not in file.values)
    ):
        rate = file.number(highest)
        file.set_option(highest, "learning_rate", 0.001 if rate is None else rate)
        if f"{ADAM}.lr" in file.values:
            file.explain(
                f"{ADAM}.lr", f"overridden by the schedule's highest rate: learning_rate {file.options.learning_rate}"
            )
    elif highest in file.values:
        file.explain(highest, f"no effect: the highest rate of {kind} is that of the optimizer")
    parameters: dict[str, Any] = {}
    for name in DEEPSPEED_SCHEDULES[kind]:
        key = f"{RATES}.{name}"
        value = file.value(key) if name == "warmup_type" else file.number(key)
        if value is not None:
            parameters[name] = value
            file.explain(key, "in lr_scheduler_kwargs")
        elif key in file.values:
            file.explain(key, "the steps of this run" if name == "total_num_steps" else "DeepSpeed's default")
    if parameters:
        file.set_option("scheduler.type", "lr_scheduler_kwargs", json.dumps(parameters))


def _autocast(file: DeepSpeedFile) -> None:
    """Set bf16, which is computed by torch.autocast."""
    if file.switch("torch_autocast.enabled"):
        if file.value("torch_autocast.dtype") not in ("bfloat16", "bf16", "torch.bfloat16"):
            raise file.error("torch_autocast.dtype", "autocast is in bf16 only; write bfloat16")
        file.set_option("torch_autocast.enabled", "bf16", True)
        file.explain("torch_autocast.dtype", "bf16")


def _zero(file: DeepSpeedFile, world_size: int | None) -> None:
    """Set the strategy from the stage of ZeRO, offload to host memory, and MiCS, which is hybrid sharding."""
    key = f"{ZERO}.stage"
    for old, new in (
        ("", "stage"),
        (".cpu_offload", "offload_optimizer.device"),
        (".cpu_offload_param", "offload_param.device"),
    ):
        if isinstance(value := file.values.get(f"{ZERO}{old}"), bool):  # an old form of the file
            file.values[f"{ZERO}.{new}"] = int(value) if new == "stage" else "cpu" if value else "none"
            file.explain(f"{ZERO}{old}", f"as {new} {json.dumps(file.values[f'{ZERO}.{new}'])}")
    stage = file.number(key, int)
    if stage is not None and stage > 3:
        raise file.error(key, "pass a stage from 0 to 3")
    offloaded = _offload(file, {"ddp": 0, "fsdp": 3}[file.options.strategy] if stage is None else stage)
    if stage == 1 and offloaded:
        file.explain(key, "as stage 2, because only FSDP offloads")
        stage = 2
    if stage is not None:
        file.set_option(key, "strategy", "fsdp" if stage >= 2 else "ddp")
    if stage in (0, 1):
        file.set_option(key, "shard_optimizer", stage == 1)
    if stage in (2, 3):
        file.set_option(key, "reshard_after_forward", stage == 3)
        if "sync_each_batch" not in file.given:  # the user may hold full gradients instead
            file.set_option(key, "sync_each_batch", True)
    shards = file.number(f"{ZERO}.mics_shard_size", int, least=-1)
    if shards is not None and shards <= 0:
        file.explain(f"{ZERO}.mics_shard_size", "no effect: off")
    elif shards is not None and world_size is not None:
        if world_size % shards:
            raise file.error(f"{ZERO}.mics_shard_size", f"{world_size} ranks are not a multiple of it; pass a divisor")
        file.set_option(f"{ZERO}.mics_shard_size", "replicas", world_size // shards)


def _offload(file: DeepSpeedFile, stage: int) -> bool:
    """Set cpu_offload, and return it. Parameters, gradients and moments are offloaded together or not at all."""
    devices = {}
    for section, first in (("offload_optimizer", 1), ("offload_param", 3)):
        key = f"{ZERO}.{section}.device"
        device = file.value(key)
        if device == "nvme":
            raise file.error(key, "offload to a disk is not implemented\nwrite cpu, or train on more ranks")
        if device not in (None, "none", "cpu"):
            raise file.error(key, "pass cpu or none")
        if device == "cpu" and stage < first:
            file.explain(key, f"no effect: it begins with stage {first}")
        elif device is not None:
            devices[key] = device == "cpu"
    for key, asked in devices.items():
        file.set_option(key, "cpu_offload", any(devices.values()))
        if not asked and any(devices.values()):
            file.explain(key, "because parameters and optimizer are offloaded together")
    return any(devices.values())


def _dtypes(file: DeepSpeedFile) -> None:
    """Set the dtype in which gradients are reduced. They accumulate in fp32."""
    key = "communication_data_type"
    dtype = file.value(key)
    if dtype in ("bf16", "bfp16") and file.options.strategy == "fsdp":
        file.set_option(key, "reduce_dtype", "bfloat16")
    elif dtype == "fp32":
        file.set_option(key, "reduce_dtype", "float32")
    elif dtype is not None:
        raise file.error(key, "ddp reduces in fp32, fsdp (stages 2 and 3) in fp32 or bf16; write one of these")
    key = "data_types.grad_accum_dtype"
    if file.value(key) not in (None, "fp32"):
        raise file.error(key, f"{FP32_ACCUMULATION}; write fp32")
    if file.value(key):
        file.explain(key, f"no effect: {FP32_ACCUMULATION}")


def _activations(file: DeepSpeedFile) -> None:
    """Set gradient checkpointing of every layer if a key asks for a form of it."""
    for name, offload in (("cpu_checkpointing", True), ("partition_activations", False), ("number_checkpoints", False)):
        key = f"{ACTIVATIONS}.{name}"
        if file.number(key, int) if name == "number_checkpoints" else file.switch(key):
            file.set_option(key, "gradient_checkpointing", True)
            if offload:
                file.set_option(key, "offload_activations", True)
            else:
                file.explain(key, "for every layer, on the rank that computes it")


def _table(file: DeepSpeedFile) -> str:
    """A line for each key: its value and its meaning. Unknown keys are repeated at the end."""
    lines = [
        (key, json.dumps(value), file.meanings.get(key) or explain_unused(key, value, file.options))
        for key, value in file.values.items()
    ]
    lines += [(key, "-", text) for key, text in file.absent.items()]
    widths = [max([len(line[column]) for line in lines] + [1]) for column in (0, 1)]
    text = [f"deepspeed {file.name}, key by key:"]
    text += [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {meaning}" for key, value, meaning in lines]
    text += [f"unknown key {key}: {meaning}" for key, _, meaning in lines if meaning.startswith(UNKNOWN)]
    return "\n".join(text)
