"""The model, its configuration and its tokenizer: from a directory, a hub id, or random weights.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import contextlib
import copy
import functools
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from config import OptionError, Options, first_line
from data.corpus import embedded_tokenizer
from fsdp.tensor_parallel import change_hidden
from model.attention import unusual
from model.float8 import compute_in_float8
from model.layers import compute_dtype, drawn_at_random, heads_of, layers_of, planned

# The model of `make train`: what two CPU cores can teach something in a few minutes. Wide initial weights, because the
# run is too short to grow them.
EMBEDDED_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "bos_token_id": None,
}


def load_config_and_tokenizer(options: Options) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration of the model that `options` name, and its tokenizer, which fit each other and the rows.

    A configuration without a tokenizer, or no model at all, gets the embedded tokenizer. Sets `options.block_size`
    where the user gave none. Raises OptionError.
    """
    option = "model_name_or_path" if options.model_name_or_path else "config_name"
    name = options.model_name_or_path or options.config_name
    config = _load_config(option, name, options.trust_remote_code) if name else None
    tokenizer = _load_tokenizer(options)
    if config is None:
        config = Qwen3Config(**EMBEDDED_MODEL, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)

    if options.tensor_parallel > 1:
        check_divides(config, options.tensor_parallel)
    if options.context_parallel > 1:
        check_heads(config.get_text_config(), options.context_parallel)
    text_config = config.get_text_config()
    if options.chat_template:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"chat_template {options.chat_template}: {error}; give a file that can be read"
            ) from error

    positions = getattr(text_config, "max_position_embeddings", None) or 1024
    if options.block_size is None:
        options.block_size = min(1024, positions)
    if options.block_size > positions:
        raise OptionError(
            f"block_size {options.block_size}: the model has {positions} positions\ngive at most that, or a model "
            "whose max_position_embeddings allow more"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= text_config.vocab_size:
        raise OptionError(
            f"tokenizer of {options.tokenizer_name or name or 'the embedded corpus'}: its highest token id is "
            f"{highest}, beyond the model's vocabulary of {text_config.vocab_size}\ngive --tokenizer_name"
        )
    return config, tokenizer


def check_divides(config: PretrainedConfig, ranks: int) -> None:
    """Refuse a model whose layers `ranks` ranks cannot divide as fsdp/tensor_parallel.py does. Raises OptionError."""
    name, plan = config.model_type, config.base_model_tp_plan or {}
    remedy = "leave it out: --strategy fsdp shards any model"
    if not plan:
        raise OptionError(f"tensor_parallel {ranks}: {name} has no plan of how its layers are divided\n{remedy}")
    # The embedding is divided in any case.
    known = {"colwise", "rowwise", "replicated_with_grad_allreduce", "embedding_rowwise"}
    if unknown := {module: style for module, style in plan.items() if style not in known}:
        module, style = min(unknown.items())
        raise OptionError(f"tensor_parallel {ranks}: the plan of {name} has {module} {style}, unknown here\n{remedy}")
    heads = heads_of(config)
    sizes = {
        "attention heads": heads.queries,
        "heads of keys and values": heads.keys,
        "entries between the projections of a layer": config.intermediate_size,
        "tokens in its vocabulary": config.vocab_size,
    }
    common = math.gcd(*sizes.values())
    for what, size in sizes.items():
        if size % ranks:
            raise OptionError(
                f"tensor_parallel {ranks}: {name} has {size:,} {what}, and {size:,} / {ranks} = {size / ranks:,.6g}\n"
                + (f"give a divisor of {common}, which divides all that must be divided" if common > 1 else remedy)
            )


def check_heads(config: PretrainedConfig, ranks: int) -> None:
    """Refuse a model whose rows `ranks` ranks cannot divide as model/context_parallel.py does. Raises OptionError.

    Its layers must look at other positions in their attention alone: a plan of how they are divided is taken for a sign
    of that, and `unusual` in model/attention.py looks at what they do. Each rank must get as many heads, together with
    those of keys that these share.
    """
    name, remedy = config.model_type, "leave it out; --gradient_checkpointing is for long rows, too"
    if not config.base_model_tp_plan:
        raise OptionError(f"context_parallel {ranks}: it is not known where {name} looks at other positions\n{remedy}")
    if "longrope" in repr(getattr(config, "rope_parameters", None)):
        raise OptionError(
            f"context_parallel {ranks}: {name} rotates long rows in another way than short ones (longrope), and each "
            f"rank would decide for its piece\n{remedy}"
        )
    try:
        heads, keys, _ = heads_of(config)
    except RuntimeError as error:  # transformers' answer where layers differ (Gemma 4)
        raise OptionError(f"context_parallel {ranks}: the layers of {name} have different heads\n{remedy}") from error
    if heads % (shared := math.lcm(keys, ranks)):
        fitting = [str(other) for other in range(2, heads + 1) if heads % math.lcm(keys, other) == 0]
        raise OptionError(
            f"context_parallel {ranks}: {name} has {heads} attention heads and {keys} of keys and values, which "
            f"{ranks} ranks share as {shared}; {heads} / {shared} = {heads / shared:,.6g}\n"
            + (f"give {', '.join(fitting)}, or {remedy}" if fitting else remedy)
        )


def check_plan(model: PreTrainedModel, ranks: int) -> None:
    """Refuse a model whose plan leaves a linear module whole: each rank of a group would count its gradient."""
    head = model.get_output_embeddings()
    linear = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    if whole := linear - planned(model).keys():
        raise OptionError(
            f"tensor_parallel {ranks}: the plan of {model.config.model_type} leaves {min(whole)} whole\n"
            "leave it out: --strategy fsdp shards any model"
        )


@functools.lru_cache(maxsize=4)
def part_of(model: PreTrainedModel, ranks: int) -> PreTrainedModel:
    """What one of `ranks` ranks that divide each layer (fsdp/tensor_parallel.py) has of `model`, on the meta device.

    For counting: its layers do to all positions what the rank's do, but between them a rank has 1 / `ranks` of those.
    """
    part, styles = copy.deepcopy(model), planned(model)
    by_rows = {part.get_input_embeddings(), part.get_output_embeddings()}
    for name, module in part.named_modules():
        style = "colwise" if module in by_rows else styles.get(name, "")
        dimension = {"colwise": 0, "rowwise": 1}.get(style, math.inf)
        for key, whole in module._parameters.items():
            if whole is not None and whole.dim() > dimension:
                shape = [size // (ranks if index == dimension else 1) for index, size in enumerate(whole.shape)]
                module._parameters[key] = torch.nn.Parameter(whole.new_empty(shape), whole.requires_grad)
    part.tie_weights()
    return part


def _load_config(option: str, name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        remedy = "give a directory that holds config.json, or a hub id"
        if "trust_remote_code" in str(error):
            remedy = "read that code, and give --trust_remote_code if it may run here"
        raise OptionError(
            f"{option} {name}: no model configuration could be loaded: {first_line(error)}\n{remedy}"
        ) from error


def _load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    name = options.tokenizer_name or options.model_name_or_path or options.config_name
    alone = name == options.config_name and not list(Path(str(name)).glob("tokenizer*"))  # a configuration, no more
    if name is None or (alone and Path(str(name)).exists()):
        return embedded_tokenizer(Path(options.data_cache_dir).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
        if not tokenizer("a")["input_ids"]:  # what transformers makes of a directory without tokenizer files
            raise ValueError("it knows no tokens")
    except Exception as error:
        cause = first_line(error)
        raise OptionError(f"{name}: no tokenizer could be loaded: {cause}\ngive --tokenizer_name") from error
    if not tokenizer.is_fast:
        raise OptionError(f"{name}: its tokenizer is not a fast one\ngive --tokenizer_name, one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise OptionError(f"{name}: its tokenizer has no EOS token, which separates documents\ngive --tokenizer_name")
    return tokenizer


def build_model(options: Options, config: PretrainedConfig) -> PreTrainedModel:
    """The model in training mode, on the meta device: fp32 parameters with a shape and no memory.

    Values come when each rank has its part (model/weights.py). Master weights are fp32 whatever dtype the files hold;
    bf16 is for compute. Raises OptionError.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=options.trust_remote_code
            )
    except Exception as error:
        option = "model_name_or_path" if options.model_name_or_path else "config_name"
        raise OptionError(
            f"{option} {config.name_or_path}: {first_line(error)}\n"
            "give a model that AutoModelForCausalLM of transformers knows"
        ) from error
    if options.model_name_or_path and model.can_generate():
        with contextlib.suppress(OSError):  # without such a file, it stays what follows from the configuration
            model.generation_config = GenerationConfig.from_pretrained(options.model_name_or_path)
    if options.activation_memory_budget is not None and (random := drawn_at_random(model)):
        raise OptionError(
            f"activation_memory_budget {options.activation_memory_budget}: the model has {random}, and what is "
            "computed again would be drawn again\ngive --gradient_checkpointing, or leave it out"
        )
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False},
            offload=options.offload_activations and torch.cuda.is_available(),  # those of a CPU are in its memory
        )
    if options.tensor_parallel > 1:
        check_plan(model, options.tensor_parallel)
    if options.context_parallel > 1 and (reason := unusual(model)):
        raise OptionError(
            f"context_parallel {options.context_parallel}: {model.config.model_type} cannot be divided so: {reason}\n"
            "leave it out; --gradient_checkpointing is for long rows, too"
        )
    if options.float8:
        compute_in_float8(model)
    if options.bf16_residual and not layers_of(model):
        raise OptionError(
            f"bf16_residual true: {type(model).__name__} has no layers that are known as such\nleave it out"
        )
    for layer in layers_of(model) if options.bf16_residual else ():
        layer.register_forward_pre_hook(_cast_hidden, with_kwargs=True)
    return model.train()


def _cast_hidden(layer: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a layer is given, it adds to, in its dtype: with this, that of torch.autocast where it is on."""
    return change_hidden(lambda hidden_BTD: hidden_BTD.to(compute_dtype(hidden_BTD)), inputs, named)


def complete(directory: Path, prompt: str, trust_remote_code: bool, new_tokens: int = 48) -> str:
    """What the exported model, loaded as any user of transformers would, makes of `prompt`; drawn with a fixed seed.

    On the CPU: beside the training state, the GPU may have no room for a second model.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust_remote_code)
    prompt_BT = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    output_BT = model.generate(
        **prompt_BT, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_k=50, pad_token_id=0
    )
    return tokenizer.decode(output_BT[0], skip_special_tokens=True)
