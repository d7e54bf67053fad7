"""Tiny models of each model class of transformers, with values that differ from any initialization."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from config.options import Options
from model.build import build_model
from model.weights import load_weights

# Sizes that four ranks cannot divide: the last one has fewer rows of the vocabulary, and no expert at all.
SIZES: dict[str, Any] = {
    "vocab_size": 389,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Configuration, dtype of the files, size of the largest file.
FAMILIES: dict[str, tuple[PretrainedConfig, torch.dtype, str]] = {
    "qwen2": (Qwen2Config(**SIZES, **UNTIED), torch.bfloat16, "5GB"),
    "qwen2.5": (Qwen2Config(**SIZES, **TIED, rope_theta=1e6), torch.bfloat16, "40KB"),
    "qwen3": (Qwen3Config(**SIZES, **TIED), torch.float32, "5GB"),
    "qwen3 moe": (Qwen3MoeConfig(**SIZES, **UNTIED, **EXPERTS), torch.bfloat16, "20KB"),
    "llama": (LlamaConfig(**SIZES, **UNTIED, rope_parameters=LLAMA3_ROPE), torch.bfloat16, "40KB"),
    "mistral": (MistralConfig(**SIZES, **UNTIED, sliding_window=16), torch.float32, "40KB"),
    "gemma": (GemmaConfig(**SIZES, **TIED), torch.bfloat16, "5GB"),
    "gemma2": (Gemma2Config(**SIZES, **TIED, sliding_window=16), torch.float32, "5GB"),
    "gemma3": (Gemma3TextConfig(**SIZES, **TIED, sliding_window=16), torch.bfloat16, "40KB"),
}


def asked_for(request: pytest.FixtureRequest, test: Callable[..., None]) -> list[str]:
    """The names of families that `test` runs in this session."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    return [str(item.callspec.params["name"]) for item in items if item.function is test]


def make_family(name: str, directory: Path, tokenizer: Path, **sizes: int) -> Path:
    """Writes its checkpoint with `save_pretrained`, and the files of `tokenizer`, to `directory`/NAME.

    `sizes` are instead of those above.
    """
    config, dtype, largest_file = copy.deepcopy(FAMILIES[name])
    config.update(sizes)
    path = directory / name
    shutil.copytree(tokenizer, path, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tokenizer / "tokenizer_config.json", path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.generation_config = GenerationConfig(temperature=0.6, top_k=20, do_sample=True, eos_token_id=[0, 1])
    model.save_pretrained(path, max_shard_size=largest_file)
    return path


def drawn(options: Options, config: PretrainedConfig) -> PreTrainedModel:
    """The model that train.py builds for `options`, on the CPU, with fixed values."""
    model = build_model(options, copy.deepcopy(config))
    model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    load_weights(model, {})
    return model
