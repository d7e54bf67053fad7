"""How an option of another trainer is answered: accepted values, what they mean here, and the values that need code.

config/peers/names.py has the answers themselves.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from config.errors import OptionError, first_line
from config.options import Options
from config.text import load_json, read_text

Given = Mapping[str, str]  # every option that the user gave, by name, with its value as text

Words = dict[str, str]  # options of ours, with their values as text

ANY = "*"  # stands for any other value in `Answer.accepted`, and {} for that value in our options

TRUE, FALSE = ("true", "yes", "t", "y", "1", "on"), ("false", "no", "f", "n", "0", "off")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an option of another trainer means here."""

    accepted: Mapping[str, str] = dataclasses.field(default_factory=dict)  # value -> our options, "" for no effect
    fact: str = ""  # what is so here, which is why a value has no effect or is refused
    remedy: str = ""  # what to do for a value that is not accepted
    note: str = ""  # what to know about an option that it becomes
    translate: Callable[[str, Given], Words | None] | None = (
        None  # instead of `accepted`, from the value and all options
    )
    shown: str = ""  # what the table of docs/options.md says, if `accepted` does not say it
    overrides: bool = False  # in its own trainer, it decides against the option that it becomes
    secret: bool = False  # its value is not printed

    @property
    def is_switch(self) -> bool:
        """Whether a word after the option is no value of it, but perhaps a run file."""
        return self.accepted == {ANY: ""} or (bool(self.accepted) and self.accepted.keys() <= {"true", "false"})


def accepted_words(answer: Answer, value: str, given: Given) -> Words | None:
    """Our options for a value, however it spells true, false or zero. None: it is not accepted."""
    if answer.translate:
        return answer.translate(value, given)
    spellings = [value.lower()]
    spellings += ["true"] * (value.lower() in TRUE) + ["false"] * (value.lower() in FALSE)
    with contextlib.suppress(ValueError):
        spellings += [f"{float(value):g}"]
    for spelling in [*spellings, ANY]:
        if spelling in answer.accepted:
            return parse_words(answer.accepted[spelling], value)
    return None


def parse_words(text: str, value: str = "") -> Words:
    """The options in a text such as "--strategy fsdp --cpu_offload true", with `value` where the text has {}."""
    words = text.split()
    return {name[2:]: setting.replace("{}", value) for name, setting in zip(words[::2], words[1::2], strict=True)}


def alias(option: str, note: str = "") -> Answer:
    """Another name of our option."""
    return Answer({ANY: f"--{option} {{}}"}, note=note)


def no_effect(fact: str) -> Answer:
    """Without effect for any value, because it only moves work or memory, or because it is so in any case."""
    return Answer({ANY: ""}, fact)


def only(value: str, fact: str, remedy: str = "") -> Answer:
    """Without effect for one value, which is what happens here; refused for others."""
    return Answer({value: ""}, fact, remedy)


def refused(fact: str, remedy: str = "") -> Answer:
    """Refused for any value."""
    return Answer({}, fact, remedy)


def interval(option: str) -> Callable[[str, Given], Words]:
    """Translate a strategy (no, steps, epoch) into the option that has the number of steps."""

    def words(value: str, given: Given) -> Words:
        kind = value.lower()
        if kind == "epoch":
            return {option: "epoch"}
        if kind in ("no", "false") and option != "logging_steps":
            return {option: "0"}
        if kind == "steps":
            unset = option == "eval_steps" and given.get("eval_steps", "0") in ("0", "0.0")
            return {"eval_steps": given.get("logging_steps", str(Options.logging_steps))} if unset else {}
        name = option.replace("_steps", "_strategy")
        kinds = "steps or epoch" if option == "logging_steps" else "no, steps or epoch"
        raise OptionError(f"{name} {value}: it is {kinds} here\npass --{option} N")

    return words


def do_eval(value: str, given: Given) -> Words | None:
    """Evaluation alone, if no option asks for training, as run_clm.py of transformers does."""
    asks = {"do_train", "max_steps", "num_train_epochs"} & given.keys()
    if value.lower() in TRUE and not asks:
        return {"num_train_epochs": "0", "max_steps": "-1"}
    return {} if value.lower() in (*TRUE, *FALSE) else None


def warmup_ratio(value: str, given: Given) -> Words:
    """A fraction of all steps is a value of warmup_steps below 1."""
    try:
        ratio, steps = float(value), float(given.get("warmup_steps", "0"))
    except ValueError:
        raise OptionError(f"warmup_ratio {value}: pass a fraction below 1") from None
    if not 0 <= ratio < 1:
        raise OptionError(f"warmup_ratio {value}: it is a fraction below 1\npass --warmup_steps for a number of steps")
    return {} if steps else {"warmup_steps": value}


def lr_decay_iters(value: str, given: Given) -> Words | None:
    """Nothing if it is the number of all steps. None for another number, at which the rate would stop falling."""
    return {} if value in (given.get("max_iters"), given.get("max_steps")) else None


PACKING = {"bfd": "documents", "bfd_split": "documents", "binpack": "documents", "wrapped": "concat"}


def packing(value: str, given: Given) -> Words | None:
    """Packing as a switch, whose kind is in packing_strategy, or a kind in the words of TRL."""
    if value.lower() in FALSE:
        return {"packing": "none"}
    if value.lower() in TRUE and given.get("stage") == "pt":  # of LLaMA-Factory
        return {"packing": "concat"}
    if value.lower() in TRUE and "stage" in given and given.get("neat_packing", "").lower() not in TRUE:
        raise OptionError(
            f"packing {value}: in LLaMA-Factory, packed records attend to each other without neat_packing\n"
            "pass --packing documents, where they do not, or concat"
        )
    kind = PACKING.get(given.get("packing_strategy", "bfd") if value.lower() in TRUE else value)
    return {"packing": kind} if kind else None


def packing_strategy(value: str, given: Given) -> Words | None:
    """Nothing by itself, because the option packing takes it into account."""
    return {} if value in PACKING else None


def resume(value: str, given: Given) -> Words | None:
    """Resuming as a switch. Raises OptionError for true, which fails in transformers if there is no checkpoint."""
    if value.lower() in TRUE:
        raise OptionError(
            f"resume_from_checkpoint {value}: it is a checkpoint directory, or auto\n"
            "pass auto, which starts from the beginning if there is no checkpoint"
        )
    return {} if value.lower() in FALSE else None


def deepspeed(value: str, given: Given) -> Words | None:
    """DeepSpeed's own switch, beside its option deepspeed_config. None for a file."""
    if value.lower() in TRUE and "deepspeed_config" not in given:
        raise OptionError(
            f"deepspeed {value}: it is a file\npass --deepspeed FILE, or use --strategy and other options"
        )
    return {} if value.lower() in (*TRUE, *FALSE) else None


def local_rank(value: str, given: Given) -> Words:
    """Nothing, if a launcher passes what LOCAL_RANK says in any case."""
    rank = os.environ.get("LOCAL_RANK", "0" if os.environ.get("WORLD_SIZE", "1") == "1" else None)
    if value not in (rank, "-1"):
        raise OptionError(
            f"local_rank {value}: LOCAL_RANK in the environment is {rank or 'missing'}\n"
            "start with torchrun --nproc_per_node=N train.py, which sets it, and remove --local_rank"
        )
    return {}


SHARDING = {
    "full_shard": "--strategy fsdp",
    "true": "--strategy fsdp",
    "shard_grad_op": "--strategy fsdp --reshard_after_forward false",
    "hybrid_shard": "--strategy fsdp --replicas {}",
    "hybrid_shard_zero2": "--strategy fsdp --reshard_after_forward false --replicas {}",
    "no_shard": "--strategy ddp",
    "offload": "--strategy fsdp --cpu_offload true",
    "auto_wrap": "",
}


def fsdp(value: str, given: Given) -> Words:
    """Sharding in the words of transformers, as in "full_shard auto_wrap"."""
    words: Words = {}
    for word in [] if value.lower() in ("", *FALSE) else value.lower().replace(",", " ").split():
        if word not in SHARDING and word not in TRUE:
            raise OptionError(
                f"fsdp {value}: {word} is none of {', '.join(SHARDING)}\npass --strategy fsdp (docs/parallelism.md)"
            )
        words |= parse_words(text := SHARDING.get(word, SHARDING["true"]), _nodes(value) if "{}" in text else "")
    return words


def _nodes(value: str) -> str:
    """The number of nodes: hybrid sharding in other trainers is a replica of the model for each node."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1" if ranks == 1 else "0"))
    if not ranks_of_node or ranks % ranks_of_node:
        raise OptionError(f"fsdp {value}: the environment has no LOCAL_WORLD_SIZE\npass --replicas NODES instead")
    return str(ranks // ranks_of_node)


# Keys of fsdp_config, without the prefix fsdp_ that they may have.
FSDP_CONFIG = {
    "reshard_after_forward": Answer(
        {
            "true": "--reshard_after_forward true",
            "false": "--reshard_after_forward false",
            "full_shard": "--reshard_after_forward true",
            "shard_grad_op": "--reshard_after_forward false",
        }
    ),
    "sharding_strategy": Answer(
        {"full_shard": "--reshard_after_forward true", "shard_grad_op": "--reshard_after_forward false"}
    ),
    "cpu_offload": Answer({"true": "--cpu_offload true", "false": "--cpu_offload false"}),
    "offload_params": Answer({"true": "--cpu_offload true", "false": "--cpu_offload false"}),
    "activation_checkpointing": Answer(
        {"true": "--gradient_checkpointing true", "false": "--gradient_checkpointing false"}
    ),
    **dict.fromkeys(("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"), Answer({"false": ""})),
    **dict.fromkeys(
        (
            *("version", "transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap", "auto_wrap_policy"),
            *("min_num_params", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states"),
            *("limit_all_gathers", "cpu_ram_efficient_loading", "state_dict_type"),
        ),
        Answer({ANY: ""}),
    ),
}


def fsdp_config(value: str, given: Given) -> Words:
    """The keys of a JSON mapping, or of a file with one. As in transformers, they count only if fsdp is on."""
    if given.get("fsdp", "").lower() in ("", *FALSE):
        return {}
    try:
        keys = load_json(value if value.lstrip().startswith("{") else read_text(Path(value).expanduser()))
    except (OSError, ValueError) as error:
        raise OptionError(f"fsdp_config {value}: {first_line(error)}; pass a JSON file") from error
    if not isinstance(keys, dict):
        raise OptionError(f"fsdp_config {value}: it is not a JSON mapping; pass --strategy fsdp and its options")
    words: Words = {}
    for key, setting in keys.items():
        answer = FSDP_CONFIG.get(key.removeprefix("fsdp_"), Answer())
        if (ours := accepted_words(answer, str(setting), given)) is None:
            raise OptionError(
                f"fsdp_config: {key} {json.dumps(setting)} has no meaning here\n"
                "remove it, and see the group Strategy of `python train.py --help`"
            )
        words |= ours
    return words


def gradient_checkpointing_kwargs(value: str, given: Given) -> Words:
    """Nothing for use_reentrant, with which the gradients are the same. Raises OptionError for other keys."""
    try:
        known = load_json(value).keys() <= {"use_reentrant"}
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise OptionError(
            f"gradient_checkpointing_kwargs {value}: every layer is checkpointed, by torch's function\n"
            "remove --gradient_checkpointing_kwargs; only use_reentrant may be in it"
        )
    return {}


# What `accelerate launch` sets for its own library: variable and value, the option that says it here, and the remedy.
ACCELERATE = (
    ("ACCELERATE_USE_FSDP", "true", "strategy", "pass --strategy fsdp"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed", "pass --deepspeed FILE"),
    ("ACCELERATE_USE_MEGATRON_LM", "true", "tensor_parallel", "pass --tensor_parallel"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", "bf16", "pass --bf16 true"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", "bf16", "pass --bf16 true"),
)


def check_accelerate(options: Options, given: Collection[str]) -> None:
    """Raise OptionError if the environment asks for what only Accelerate reads, and the user gave no such option."""
    for variable, value, option, remedy in ACCELERATE:
        if os.environ.get(variable, "").lower() != value or option in given or getattr(options, option) is True:
            continue
        raise OptionError(
            f"{variable}={value}: only Accelerate follows its own configuration, and this trainer has {option} "
            f"{str(getattr(options, option)).lower()}\n{remedy}, or start with torchrun"
        )
