"""The model, its configuration and its tokenizer: from a directory, a hub id, or random weights.

Shapes: B sequences, T tokens of a sequence, D hidden size.
"""

import contextlib
import os
import re
import sys
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
    StoppingCriteriaList,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from config.demo import DEMO_MODEL, demo_tokenizer
from config.errors import OptionError, first_line
from config.options import Options
from config.text import read_text
from model.adapters import CONFIG, add_adapters
from model.documents.attention import attention_obstacle
from model.experts import use_grouped_products
from model.export import load_finished
from model.float8 import compute_in_float8
from model.layers import compute_dtype, decoder_layers, freeze_unused, random_noise
from parallel.checks import (
    check_context_parallel,
    check_expert_parallel,
    check_plan_is_complete,
    check_tensor_parallel,
)
from parallel.group import map_hidden_states
from runtime.files import require_readable
from runtime.limits import limited
from runtime.signals import stop_requested

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SECONDS, GIBIBYTES = (
    100.0,
    8,
)  # to read a configuration, and to build its model without tensors; usual are a few seconds


def load_config_and_tokenizer(options: Options) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration of the model in `options`, and its tokenizer.

    Without a model, or for a configuration without a tokenizer, the tokenizer is that of the demo. Sets
    `options.block_size` if it is None. Raises OptionError if model, tokenizer and `block_size` do not fit.
    """
    option = "model_name_or_path" if options.model_name_or_path else "config_name"
    name = options.model_name_or_path or options.config_name
    for each, given in ((option, name), ("tokenizer_name", options.tokenizer_name)):
        if given:
            _require_path(each, given)
    for path in {Path(each).expanduser() for each in (name, options.tokenizer_name) if each}:
        require_readable(option if str(path) == name else "tokenizer_name", path)
    config = _load_config(option, name, options.trust_remote_code) if name else None
    tokenizer = _load_tokenizer(options)
    if config is None:
        config = Qwen3Config(**DEMO_MODEL, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)

    if options.tensor_parallel > 1:
        check_tensor_parallel(config, options.tensor_parallel)
    if options.context_parallel > 1:
        check_context_parallel(config.get_text_config(), options.context_parallel)
    text_config = config.get_text_config()
    if options.chat_template:
        try:
            tokenizer.chat_template = read_text(Path(options.chat_template))
            tokenizer.chat_template_file = options.chat_template  # for messages
        except (OSError, ValueError) as error:
            raise OptionError(
                f"chat_template {options.chat_template}: {error}; pass a file that can be read"
            ) from error

    positions = getattr(text_config, "max_position_embeddings", None) or 1024
    if options.block_size is None:
        options.block_size = min(1024, positions)
    if options.block_size > positions:
        raise OptionError(
            f"block_size {options.block_size}: the model has {positions} positions\npass --block_size {positions} "
            "or less, or a model with larger max_position_embeddings"
        )
    _check_vocabulary(tokenizer, text_config.vocab_size, options.tokenizer_name or name or "the embedded corpus")
    return config, tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    """Refuse a tokenizer with ids beyond the model's vocabulary of `size`.

    Added tokens may have such ids, because some models come with more of them than embeddings. Texts that contain one
    are refused when they are tokenized (data/tokens.py), which needs the size for that.
    """
    beyond = {token for token in tokenizer.get_vocab().values() if token >= size}
    if beyond - tokenizer.added_tokens_decoder.keys() or tokenizer.eos_token_id in beyond:
        raise OptionError(
            f"tokenizer of {name}: its highest token id is {max(beyond)}, beyond the model's vocabulary of {size}\n"
            "pass --tokenizer_name"
        )
    if beyond:
        tokenizer.model_vocabulary_size = size


def _require_model(option: str, path: Path) -> None:
    """Refuse a directory without a model. Raises OptionError."""
    if (path / "state.json").exists():
        raise OptionError(
            f"{option} {path}: it is a checkpoint of a run, not a finished model\n"
            "continue the run with --resume_from_checkpoint auto, or pass the output_dir of a finished run"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise OptionError(f"{option} {path}: it has no config.json\npass the directory of a model")


def _require_path(option: str, name: str) -> None:
    """Refuse a path that does not exist. transformers would take it for a hub id. Raises OptionError."""
    if not (Path(name).exists() or HUB_ID.fullmatch(name)):
        raise OptionError(f"{option} {name}: no such file or directory\npass a directory that exists, or a hub id")


def _load_config(option: str, name: str, trust_remote_code: bool) -> PretrainedConfig:
    if (Path(name) / CONFIG).exists():
        raise OptionError(
            f"{option} {name}: it holds adapters of another model ({CONFIG}), and no model\n"
            "pass the model, or export adapters and model as one: train with --merge_lora"
        )
    _require_model(option, Path(name))
    try:
        with limited(SECONDS, GIBIBYTES):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        remedy = "pass a directory that holds config.json, or a hub id"
        if "trust_remote_code" in str(error):
            remedy = "read that code, and pass --trust_remote_code if it may run here"
        cause = " ".join(str(error).split())[:300]
        raise OptionError(f"{option} {name}: no model configuration could be loaded: {cause}\n{remedy}") from error
    for part in (config, config.get_text_config()):
        for key in ("attn_implementation", "experts_implementation"):
            if "/" in str(value := getattr(part, f"_{key}", "")) and not trust_remote_code:
                raise OptionError(
                    f"{option} {name}: its config.json has {key} {value}, and transformers would run code from there\n"
                    "remove the key, or pass --trust_remote_code if that code may run here"
                )
    return config


def _load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    name = options.tokenizer_name or options.model_name_or_path or options.config_name
    config_only = name == options.config_name and not list(Path(str(name)).glob("tokenizer*"))
    if name is None or (config_only and Path(str(name)).exists()):
        return demo_tokenizer(Path(options.data_cache_dir).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
        if not tokenizer("a")["input_ids"]:  # as transformers builds it without tokenizer files
            raise ValueError("it has no tokens")
    except Exception as error:
        cause = first_line(error)
        raise OptionError(f"{name}: no tokenizer could be loaded: {cause}\npass --tokenizer_name") from error
    if not tokenizer.is_fast:
        raise OptionError(f"{name}: its tokenizer is not fast\npass a --tokenizer_name with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise OptionError(f"{name}: its tokenizer has no EOS token, which separates documents\npass --tokenizer_name")
    return tokenizer


def build_model(options: Options, config: PretrainedConfig) -> PreTrainedModel:
    """The model in training mode, on the meta device: fp32 parameters with a shape and no memory.

    load_weights (model/weights.py) fills each rank's shards. Parameters are fp32 whatever the dtype of the files; bf16
    is for compute only. With `use_peft`, the model has adapters, and is frozen in bf16. Raises OptionError.
    """
    try:
        with torch.device("meta"), limited(SECONDS, GIBIBYTES):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=options.trust_remote_code
            )
    except Exception as error:
        option = "model_name_or_path" if options.model_name_or_path else "config_name"
        raise OptionError(
            f"{option} {config.name_or_path}: {first_line(error)}\n"
            "pass a model that AutoModelForCausalLM of transformers knows"
        ) from error
    if options.model_name_or_path and model.can_generate():
        with contextlib.suppress(OSError):  # without such a file, it follows from the configuration
            model.generation_config = GenerationConfig.from_pretrained(options.model_name_or_path)
    freeze_unused(model)
    if options.use_peft:
        add_adapters(model, options)
    _check_layers(options, model)
    use_grouped_products(model)
    if options.activation_memory_budget is not None and (random := random_noise(model)):
        raise OptionError(
            f"activation_memory_budget {options.activation_memory_budget}: the model has {random}, and "
            "recomputation would draw other random numbers\nuse --gradient_checkpointing instead"
        )
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False},
            offload=options.offload_activations
            and torch.cuda.is_available(),  # on a CPU, they are already in host memory
        )
    if options.tensor_parallel > 1:
        check_plan_is_complete(model, options.tensor_parallel)
    if options.expert_parallel > 1:
        check_expert_parallel(model, options.expert_parallel)
    if options.context_parallel > 1 and (reason := attention_obstacle(model)):
        raise OptionError(
            f"context_parallel {options.context_parallel}: {model.config.model_type} is not supported: {reason}\n"
            "remove --context_parallel; --gradient_checkpointing also saves memory with long sequences"
        )
    if options.float8:
        compute_in_float8(model)
    for layer in decoder_layers(model) if options.bf16_residual else ():
        layer.register_forward_pre_hook(_cast_hidden, with_kwargs=True)
    return model.train()


def _check_layers(options: Options, model: PreTrainedModel) -> None:
    """Refuse options that need decoder layers if the model has none; turn compilation off then."""
    layers, name = decoder_layers(model), type(model).__name__
    requested = {
        "optim": options.optim == "muon",
        "float8": options.float8,
        "bf16_residual": options.bf16_residual,
        "gradient_checkpointing": options.gradient_checkpointing,
        "activation_memory_budget": options.activation_memory_budget is not None,
    }
    for option in requested if not layers else ():
        if requested[option]:
            value = str(getattr(options, option)).lower()
            raise OptionError(f"{option} {value}: no decoder layers are found in {name}\nremove --{option}")
    # Remote code of a model may have its own checkpointing.
    checkpointed = any(isinstance(layer, GradientCheckpointingLayer) for layer in layers) or model.is_remote_code()
    if options.gradient_checkpointing and not (checkpointed and model.supports_gradient_checkpointing):
        raise OptionError(f"gradient_checkpointing true: {name} does not support it\nremove --gradient_checkpointing")
    if options.torch_compile and not layers:
        options.torch_compile = False
        if os.environ.get("RANK", "0") == "0":
            print(f"torch_compile: off, because no decoder layers are found in {name}", file=sys.stderr)


def _cast_hidden(layer: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Cast the input of a layer, and so its residual stream, to the dtype of torch.autocast if it is on."""
    return map_hidden_states(lambda hidden_BTD: hidden_BTD.to(compute_dtype(hidden_BTD)), inputs, named)


def generate_completion(options: Options, tokens: list[int], new_tokens: int = 48) -> str:
    """What the exported model writes after `options.prompt`, whose `tokens` are those that it sees.

    Sampled with a fixed seed, on the CPU, because the GPU may have no memory for a second model. A signal ends it.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.output_dir, trust_remote_code=options.trust_remote_code)
    model = load_finished(options.output_dir, options.trust_remote_code)
    prompt_BT = torch.tensor([tokens])
    torch.manual_seed(0)
    stopped = StoppingCriteriaList([lambda ids_BT, _: torch.full(ids_BT.shape[:1], stop_requested())])
    output_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        **{"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.7, "top_k": 50, "pad_token_id": 0},
        stopping_criteria=stopped,
    )
    completion = tokenizer.decode(output_BT[0, len(tokens) :], skip_special_tokens=True)
    return f"--- completion of {options.prompt!r} ---\n{completion}\n---"
