"""A DeepSpeed file, read natively: what each key of its JSON becomes among the options of this trainer.

    python -m config FILE --ranks N [options of train.py]

prints the table that `train.py --deepspeed FILE` prints when it starts. DeepSpeed itself is not needed. What the file
says goes; where it says "auto" or nothing, our own options do; an option that is given and says something else is an
error. Meanings and defaults are those of DeepSpeed 0.19. A key that cannot be followed without giving other numbers is
refused; one that only moves work or memory has no effect, and its line says why. No key goes unmentioned.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.deepspeed_keys import (
    ABSENT,
    ACTIVATIONS,
    ADAM,
    ALWAYS_FP32,
    BATCH,
    BATCH_OPTIONS,
    DIRECT,
    FOLLOWED,
    NO_EFFECT,
    OTHER_MODEL,
    OURS,
    RATES,
    REFUSED,
    UNKNOWN,
    ZERO,
)
from config.errors import OptionError
from config.options import SCHEDULE_PARAMETERS, Options
from config.plan import data_parallel_groups


@dataclass
class File:
    """A file's values by dotted key, what each became so far, and the options that it is read into."""

    name: str
    values: dict[str, Any]
    options: Options
    given: set[str]  # names of options that the user gave
    became: dict[str, str] = dataclasses.field(default_factory=dict)
    derived: dict[str, str] = dataclasses.field(default_factory=dict)  # the same of keys that the file has not

    def says(self, key: str) -> Any:
        """The value of a key; None where the file leaves it to our own options."""
        value = self.values.get(key)
        return None if value == "auto" else value

    def number(self, key: str, kind: type = float, least: float = 0) -> Any:
        """The same as a float, or as a whole number, which may stand as 2e8. Raises OptionError for anything else."""
        value = self.says(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise self.error(key, f'pass a number of at least {least}, or "auto"')
        if kind is int and value != int(value):
            raise self.error(key, 'pass a whole number, or "auto"')
        return kind(value)

    def switch(self, key: str) -> bool | None:
        """The same as true or false."""
        value = self.says(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, 'pass true, false or "auto"')
        return value

    def error(self, key: str, why: str) -> OptionError:
        """What is wrong with a key, and the remedy."""
        return OptionError(f"deepspeed {self.name}: {key} {json.dumps(self.values.get(key))}: {why}")

    def want(self, key: str, option: str, value: Any) -> None:
        """Let an option have a value, because of a key. Raises OptionError if the user gave it another one."""
        now = getattr(self.options, option)
        if option in self.given and now != value:
            raise OptionError(
                f"{option} {_shown(now)}: {key} {json.dumps(self.values.get(key))} of {self.name} means {option} "
                f'{_shown(value)}\nleave the option out, or change the file; "auto" there lets the option decide'
            )
        setattr(self.options, option, value)
        self.explain(key, f"{option} {_shown(value)}")

    def explain(self, key: str, text: str) -> None:
        """Say what a key became; further texts of one key join the first."""
        texts = self.became if key in self.values else self.derived
        joint = " " if text.startswith("=") else ", "
        texts[key] = f"{texts[key]}{joint}{text}" if key in texts else text


def read(options: Options, given: set[str], world_size: int | None) -> str:
    """Put what the file `options.deepspeed` says into `options`, of which the user gave those `given`.

    Returns the table of its keys: what each became. Without a `world_size`, for who only prepares data, the arithmetic
    of the batch is left out. Raises OptionError for what contradicts itself or an option, and for what is not here.
    """
    assert options.deepspeed
    file = File(options.deepspeed, _flatten(_load(options.deepspeed)), options, given)
    _refuse(file)
    for key, option in (
        ("tensor_parallel.autotp_size", "tensor_parallel"),
        ("sequence_parallel_size", "context_parallel"),
    ):
        if divided := file.number(key, int):
            file.want(key, option, divided)
    readers = shards = None  # those that read rows of their own, and that hold shards
    if world_size is not None:  # config.check refuses what is not whole
        readers = max(1, world_size // options.model_parallel_size)
        shards = max(1, world_size // options.tensor_parallel)
    _batch(file, readers)
    _optimizer(file)
    _scheduler(file)
    if file.values.get("steps_per_print") == math.inf:  # as Accelerate writes it: never
        file.explain("steps_per_print", f"our own logging_steps {options.logging_steps}")
    for key, (option, kind) in DIRECT.items():
        if key in file.became:
            continue
        value = file.switch(key) if kind is bool else file.number(key, kind)
        if value is not None:
            file.want(key, option, value)
    _autocast(file)
    _zero(file, shards)
    _exchange(file)
    _activations(file)
    if file.switch("tensorboard.enabled"):
        file.want("tensorboard.enabled", "report_to", "tensorboard")
    for key in ABSENT:
        if key not in file.values and not (key == "bf16.enabled" and "bfloat16.enabled" in file.values):
            file.explain(key, f"our own {OURS[key]} {_shown(getattr(options, OURS[key]))}")
    return _table(file)


def _load(name: str) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{min(repeated)} stands in it twice")
        return dict(pairs)

    try:
        values = json.loads(Path(name).read_text(), object_pairs_hook=without_repeats)
        if not isinstance(values, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"deepspeed {name}: {cause}; pass a JSON file as DeepSpeed reads it") from error
    return values


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings, in their order."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _refuse(file: File) -> None:
    """Raises OptionError for what would be other numbers, or another model, than we can give."""
    for key, value in file.values.items():
        why = REFUSED.get(key)
        if key.startswith(("compression_training.", "weight_quantization.")) and key.endswith("enabled"):
            why = OTHER_MODEL
        if why is None and (why := REFUSED.get(key.rpartition(".")[0])):  # all of a section
            raise file.error(key, why)
        if why is None or value in ("auto", "none", "mean"):
            continue
        is_size = key.endswith("_size")  # 1 is the size of nothing
        if value > is_size if isinstance(value, int | float) else value:
            raise file.error(key, why)


def _batch(file: File, world_size: int | None) -> None:
    """train_batch_size = micro-batch x accumulation x ranks: what is missing follows from the others."""
    options = file.options
    known = {option for option in BATCH_OPTIONS if option in file.given}
    for key, option in zip(BATCH, BATCH_OPTIONS, strict=True):
        if (value := file.number(key, int, least=1)) is not None:
            file.want(key, option, value)
            known.add(option)
    if world_size is None:
        return
    rows, micro_batch, accumulation = (getattr(options, name) if name in known else None for name in BATCH_OPTIONS)
    if rows is None:
        micro_batch = micro_batch or options.per_device_train_batch_size
        accumulation = accumulation or options.gradient_accumulation_steps
        rows = micro_batch * accumulation * world_size
    elif micro_batch is None:
        accumulation = accumulation or 1
        micro_batch = rows / (accumulation * world_size)
    elif accumulation is None:
        accumulation = rows / (micro_batch * world_size)
    theirs = (
        f"train_micro_batch_size_per_gpu {micro_batch:.4g} x gradient_accumulation_steps {accumulation:.4g} x "
        f"{data_parallel_groups(file.options, world_size)}"
    )
    whole = micro_batch == int(micro_batch) and accumulation == int(accumulation)
    if not whole or rows != micro_batch * accumulation * world_size:
        result = f"is not {theirs} = {micro_batch * accumulation * world_size:.6g}" if whole else f"= {theirs}"
        raise OptionError(
            f"deepspeed {file.name}: train_batch_size {rows} {result}{'' if whole else ': not whole'}\n"
            'change one of them or the number of ranks, or write "auto" for one that shall follow from the others'
        )
    options.per_device_train_batch_size, options.gradient_accumulation_steps = int(micro_batch), int(accumulation)
    for key, option, value in zip(BATCH, BATCH_OPTIONS, (rows, micro_batch, accumulation), strict=True):
        if key not in file.became:
            file.explain(key, f"{option} {int(value)}")
    file.explain(
        BATCH[0],
        f"= {micro_batch:.0f} rows x {accumulation:.0f} micro-steps x {data_parallel_groups(options, world_size)}",
    )


def _optimizer(file: File) -> None:
    """AdamW; and Adam, which is AdamW in DeepSpeed unless it is told otherwise."""
    kind = file.says("optimizer.type")
    if file.values.get(f"{ADAM}.betas") == "auto":
        file.explain(
            f"{ADAM}.betas", f"our own adam_beta1 {file.options.adam_beta1}, adam_beta2 {file.options.adam_beta2}"
        )
    if kind is not None:
        if str(kind).lower() not in ("adam", "adamw"):
            raise file.error("optimizer.type", "the optimizer here is AdamW; write that, or remove the section")
        file.want("optimizer.type", "optim", "adamw_torch_fused")
        file.explain("optimizer.type", "norms and biases never decay")
    betas = file.says(f"{ADAM}.betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(beta, float | int) for beta in betas):
            raise file.error(f"{ADAM}.betas", 'pass two numbers, or "auto"')
        file.want(f"{ADAM}.betas", "adam_beta1", betas[0])
        file.want(f"{ADAM}.betas", "adam_beta2", betas[1])
    if file.switch(f"{ADAM}.bias_correction") is False:
        raise file.error(f"{ADAM}.bias_correction", "AdamW corrects the bias; remove it")
    decay = file.number(f"{ADAM}.weight_decay")
    decay = file.options.weight_decay if decay is None else decay
    if str(kind).lower() == "adam" and file.switch(f"{ADAM}.adam_w_mode") is False and decay:
        raise file.error(
            f"{ADAM}.adam_w_mode",
            f"Adam would add weight_decay {decay} to the gradient, which is not AdamW\n"
            "write weight_decay 0, with which both are the same, or adam_w_mode true",
        )


def _scheduler(file: File) -> None:
    """The warmup schedules, by DeepSpeed's own arithmetic: model/optimizer.py."""
    kind = file.says("scheduler.type")
    if kind is None:
        for key in file.values:
            if key.startswith(f"{RATES}."):
                file.explain(key, f"no effect: our own lr_scheduler_type {file.options.lr_scheduler_type}")
        return
    if not isinstance(kind, str) or kind not in SCHEDULE_PARAMETERS:
        raise file.error("scheduler.type", f"pass {', '.join(SCHEDULE_PARAMETERS)}, or remove the section")
    file.want("scheduler.type", "lr_scheduler_type", kind)
    steps = f"{RATES}.warmup_num_steps"
    if steps not in file.values or file.says(steps) is not None:
        number = file.number(steps, int)
        file.want(steps, "warmup_steps", 1000 if number is None else number)
    # Where the schedule has a highest rate, that wins over the optimizer's.
    highest = f"{RATES}.warmup_max_lr"
    if kind != "WarmupCosineLR" and (
        file.says(highest) is not None or (kind == "WarmupDecayLR" and highest not in file.values)
    ):
        rate = file.number(highest)
        file.want(highest, "learning_rate", 0.001 if rate is None else rate)
        if f"{ADAM}.lr" in file.values:
            file.explain(
                f"{ADAM}.lr", f"the schedule's own highest rate wins: learning_rate {file.options.learning_rate}"
            )
    elif highest in file.values:
        file.explain(highest, f"no effect: the highest rate of {kind} is the optimizer's")
    parameters: dict[str, Any] = {}
    for name in SCHEDULE_PARAMETERS[kind]:
        key = f"{RATES}.{name}"
        value = file.says(key) if name == "warmup_type" else file.number(key)
        if value is not None:
            parameters[name] = value
            file.explain(key, "in lr_scheduler_kwargs")
        elif key in file.values:
            file.explain(key, "the steps of this run" if name == "total_num_steps" else "DeepSpeed's default")
    if parameters:
        file.want("scheduler.type", "lr_scheduler_kwargs", json.dumps(parameters))


def _autocast(file: File) -> None:
    """torch.autocast is how bf16 is computed here in any case."""
    if file.switch("torch_autocast.enabled"):
        if file.says("torch_autocast.dtype") not in ("bfloat16", "bf16", "torch.bfloat16"):
            raise file.error("torch_autocast.dtype", "only bf16 is here; write bfloat16")
        file.want("torch_autocast.enabled", "bf16", True)
        file.explain("torch_autocast.dtype", "bf16")


def _zero(file: File, world_size: int | None) -> None:
    """The stages of ZeRO, offload to the CPU, and MiCS, which is hybrid sharding."""
    key = f"{ZERO}.stage"
    for old, new in (
        ("", "stage"),
        (".cpu_offload", "offload_optimizer.device"),
        (".cpu_offload_param", "offload_param.device"),
    ):
        if isinstance(value := file.values.get(f"{ZERO}{old}"), bool):  # an old form
            file.values[f"{ZERO}.{new}"] = int(value) if new == "stage" else "cpu" if value else "none"
            file.explain(f"{ZERO}{old}", f"as {new} {json.dumps(file.values[f'{ZERO}.{new}'])}")
    stage = file.number(key, int)
    if stage is not None and stage > 3:
        raise file.error(key, "the stages are 0 to 3")
    offloaded = _offload(file, {"ddp": 0, "fsdp": 3}[file.options.strategy] if stage is None else stage)
    if stage == 1 and offloaded:
        file.explain(key, "as stage 2, because FSDP is what offloads")
        stage = 2
    if stage is not None:
        file.want(key, "strategy", "fsdp" if stage >= 2 else "ddp")
    if stage in (0, 1):
        file.want(key, "shard_optimizer", stage == 1)
    if stage in (2, 3):
        file.want(key, "reshard_after_forward", stage == 3)
        if "sync_each_batch" not in file.given:  # the stage says no more than that only shards are kept
            file.want(key, "sync_each_batch", True)
    shards = file.number(f"{ZERO}.mics_shard_size", int, least=-1)
    if shards is not None and shards <= 0:
        file.explain(f"{ZERO}.mics_shard_size", "no effect: off")
    elif shards is not None and world_size is not None:
        if world_size % shards:
            raise file.error(f"{ZERO}.mics_shard_size", f"{world_size} ranks are no multiple of it; pass a divisor")
        file.want(f"{ZERO}.mics_shard_size", "replicas", world_size // shards)


def _offload(file: File, stage: int) -> bool:
    """Whether anything is offloaded; then it is all: parameters, gradients and moments."""
    devices = {}
    for section, first in (("offload_optimizer", 1), ("offload_param", 3)):
        key = f"{ZERO}.{section}.device"
        device = file.says(key)
        if device == "nvme":
            raise file.error(key, "there is no offload to disks here\nwrite cpu, or shard over more ranks")
        if device not in (None, "none", "cpu"):
            raise file.error(key, "pass cpu or none")
        if device == "cpu" and stage < first:
            file.explain(key, f"no effect: it begins with stage {first}")
        elif device is not None:
            devices[key] = device == "cpu"
    for key, itself in devices.items():
        file.want(key, "cpu_offload", any(devices.values()))
        if not itself and any(devices.values()):
            file.explain(key, "because parameters and optimizer are offloaded together")
    return any(devices.values())


def _exchange(file: File) -> None:
    """In which dtype gradients travel, and add up."""
    key = "communication_data_type"
    dtype = file.says(key)
    if dtype in ("bf16", "bfp16") and file.options.strategy == "fsdp":
        file.want(key, "reduce_dtype", "bfloat16")
    elif dtype == "fp32":
        file.want(key, "reduce_dtype", "float32")
    elif dtype is not None:
        raise file.error(key, "ddp reduces in fp32, fsdp (stages 2 and 3) in fp32 or bf16; write one of these")
    key = "data_types.grad_accum_dtype"
    if file.says(key) not in (None, "fp32"):
        raise file.error(key, f"{ALWAYS_FP32}; write fp32")
    if file.says(key):
        file.explain(key, f"no effect: {ALWAYS_FP32}")


def _activations(file: File) -> None:
    """Checkpointing of each layer, if a key asks for any of it."""
    for name, more in (("cpu_checkpointing", True), ("partition_activations", False), ("number_checkpoints", False)):
        key = f"{ACTIVATIONS}.{name}"
        if file.number(key, int) if name == "number_checkpoints" else file.switch(key):
            file.want(key, "gradient_checkpointing", True)
            if more:
                file.want(key, "offload_activations", True)
            else:
                file.explain(key, "of every layer, by the rank that computes it")


def _table(file: File) -> str:
    """A line for each key: its value, and what it became. Ends with what is not known."""
    lines = [(key, json.dumps(value), _meaning(file, key, value)) for key, value in file.values.items()]
    lines += [(key, "-", text) for key, text in file.derived.items()]
    widths = [max([len(line[column]) for line in lines] + [1]) for column in (0, 1)]
    text = [f"deepspeed {file.name}, key by key:"]
    text += [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {meaning}" for key, value, meaning in lines]
    text += [f"unknown key {key}: {meaning}" for key, _, meaning in lines if meaning.startswith(UNKNOWN)]
    return "\n".join(text)


def _meaning(file: File, key: str, value: Any) -> str:
    if key in file.became:
        return file.became[key]
    if value in ("auto", None) and key in OURS:
        return f"our own {OURS[key]} {_shown(getattr(file.options, OURS[key]))}"
    if key in REFUSED or key in FOLLOWED:
        return "no effect: off"
    with_effect = {*OURS, *REFUSED, *FOLLOWED}
    known = {*with_effect, *NO_EFFECT}
    if any(other.startswith(f"{key}.") for other in known):  # a section
        return "no effect: empty" if value == {} else f"{UNKNOWN}; it takes a mapping, as in DeepSpeed"
    section, _, name = key.rpartition(".")

    def close(words: set[str], word: str) -> str:
        return "".join(difflib.get_close_matches(word, words, n=1, cutoff=0.75))

    def within(section: str, keys: set[str]) -> set[str]:
        return {other.rpartition(".")[2] for other in keys - {key} if other.rpartition(".")[0] == section}

    # A switch that has an effect may be meant even where all else in its section has none.
    if key not in NO_EFFECT and (meant := close(within(section, with_effect), name)):
        return f"{UNKNOWN}; did you mean {'.'.join(filter(None, [section, meant]))}?"
    for parent in [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]:
        if parent in NO_EFFECT:
            return f"no effect: {NO_EFFECT[parent]}"
    sections = {other.rpartition(".")[0] for other in known} | within("", known)
    section = section if section in sections else close(sections, section)
    meant = close(within(section, known), name)
    return UNKNOWN + (f"; did you mean {'.'.join(filter(None, [section, meant]))}?" if meant else "")


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
