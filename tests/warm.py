"""What each rank does first, done once in the server from which tests/launch.py forks them: a third of a short run.

The model is on the meta device and runs on tensors without values, so torch starts no threads, which a fork would lose.
What stays are caches of libraries: compiled patterns of transformers, and how operators act on shapes.
"""

import torch
from transformers import Qwen3Config
from transformers.conversion_mapping import get_model_conversion_mapping

import train  # noqa: F401
from config.options import Options
from estimate.activations import count_activations
from loss.next_token import NextToken
from model.build import build_model

options = Options(block_size=64, bf16=False, torch_compile=False)
model = build_model(options, Qwen3Config(vocab_size=384, hidden_size=32, num_hidden_layers=2, head_dim=8))
get_model_conversion_mapping(model)
NextToken(model)
count_activations(model, options)
assert not torch.cuda.is_initialized(), "a rank could not use CUDA after the fork"  # type: ignore[no-untyped-call]
