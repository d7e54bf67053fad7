"""The model, its configuration and its tokenizer: from a directory, a hub id, or random weights.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from config import OptionError, Options
from data.corpus import embedded_tokenizer


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; for a configuration that has none, the embedded one. Raises OptionError."""
    name = options.tokenizer_name or options.model_name_or_path or options.config_name
    if name is None or (name == options.config_name and not _has_tokenizer(name)):
        return embedded_tokenizer(Path(options.data_cache_dir).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise OptionError(
            f"{name}: no tokenizer could be loaded: {_first_line(error)}\ngive --tokenizer_name"
        ) from error
    if tokenizer.eos_token_id is None:
        raise OptionError(f"{name}: its tokenizer has no EOS token, which separates documents\ngive --tokenizer_name")
    return tokenizer


def load_config(options: Options, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of the model. Raises OptionError when it does not fit the tokenizer or the rows.

    Sets `options.block_size` where the user gave none.
    """
    name = options.model_name_or_path or options.config_name
    if name is None:
        config: PretrainedConfig = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except Exception as error:
            option = "model_name_or_path" if options.model_name_or_path else "config_name"
            raise OptionError(
                f"{option} {name}: no model configuration could be loaded: {_first_line(error)}\n"
                "give a directory that holds config.json, or a hub id"
            ) from error
    positions = getattr(config, "max_position_embeddings", None) or 1024
    if options.block_size is None:
        options.block_size = min(1024, positions)
    if options.block_size > positions:
        raise OptionError(f"block_size {options.block_size}: the model has {positions} positions; give at most that")
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise OptionError(
            f"tokenizer {tokenizer.name_or_path or 'embedded'}: its highest token id is {highest}, beyond the "
            f"model's vocabulary of {config.vocab_size}\ngive the model's own tokenizer"
        )
    return config


def build_model(options: Options, config: PretrainedConfig) -> PreTrainedModel:
    """The model on the CPU in fp32, in training mode: pretrained weights, or random ones drawn from torch's RNG.

    Master weights are fp32 whatever dtype the files hold; bf16 is for compute. Weights are drawn on the CPU, so that
    they are the same on every rank and every kind of device for one seed. Costs a full copy in host memory per rank.
    """
    if options.model_name_or_path:
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # the checks below speak instead
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                options.model_name_or_path, config=config, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            raise OptionError(
                f"model_name_or_path {options.model_name_or_path}: its weights could not be loaded: "
                f"{_first_line(error)}\ngive a complete checkpoint"
            ) from error
        wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names and "error" not in kind}
        if wrong:
            kind, names = next(iter(wrong.items()))
            raise OptionError(
                f"model_name_or_path {options.model_name_or_path}: {len(names)} {kind.replace('_', ' ')}, "
                f"for instance {names[0]}\ngive a complete checkpoint of a {type(model).__name__}"
            )
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def complete(directory: Path, prompt: str, device: torch.device, new_tokens: int = 48) -> str:
    """The greedy continuation of `prompt` by the exported model, loaded as any user of transformers would."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).to(device)
    prompt_BT = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    output_BT = model.generate(**prompt_BT, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output_BT[0], skip_special_tokens=True)


def _has_tokenizer(name: str) -> bool:
    try:
        AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
