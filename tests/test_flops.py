"""Proves estimate/flops.py: operations of a token by hand, and by torch's counter in a forward and backward pass."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from config.options import Options
from estimate.flops import count_uses, flops_per_token
from estimate.start_block import model_line
from model.build import build_model

# Vocabulary; hidden, MLP and expert size; layers; query heads, key-value heads, head_dim.
V, D, F, M, L, H, K, E = 32, 16, 24, 40, 2, 4, 2, 8
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": E,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 0,
}
MIXTURE: dict[str, Any] = {**SIZES, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": M}
PROJECTIONS = D * H * E * 2 + D * K * E * 2
DELTA: dict[str, int] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# A configuration, the weights that a token is multiplied with, and of attention H x (E of keys + E of values).
BY_HAND: dict[str, tuple[PretrainedConfig, int, int]] = {
    "dense": (Qwen3Config(**SIZES), L * (PROJECTIONS + 3 * D * F) + D * V, L * H * 2 * E),
    "Conv1D": (GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=H), L * 12 * D * D + D * V, L * 2 * D),
    "experts": (
        Qwen3MoeConfig(**MIXTURE),
        L * (PROJECTIONS + 5 * D + 2 * 3 * D * M) + D * V,  # the router, and two of five experts
        L * H * 2 * E,
    ),
    "a shared expert": (
        Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=20),
        L * (PROJECTIONS + 5 * D + 2 * 3 * D * M + 3 * D * 20 + D) + D * V,
        L * H * 2 * E,
    ),
    "latent attention, a dense layer": (
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": H, "head_dim": 4},
            moe_intermediate_size=M,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=6,
            kv_lora_rank=10,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=12,
        ),
        L * (D * 6 + 6 * H * 8 + D * (10 + 4) + 10 * H * (4 + 12) + H * 12 * D)
        + 3 * D * F
        + (4 * D + 3 * 3 * D * M)
        + D * V,
        L * H * (8 + 12),
    ),
    "routing depends on values": (
        JetMoeConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_key_value_heads=K, kv_channels=E,
                     intermediate_size=M, num_local_experts=4, num_experts_per_tok=2),
        L * (2 * 2 * D * K * E + D * 2 * K * E + 2 * 4 * D + 2 * 3 * D * M) + D * V,
        L * 2 * K * 2 * E,
    ),
    "no attention": (
        MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, state_size=4, time_step_rank=3),
        L * (D * 64 + 32 * 4 + 32 * (3 + 8) + 3 * 32 + 32 * D) + D * V,  # with a convolution over 4 positions
        0,
    ),
    "a hybrid": (
        Qwen3NextConfig(
            **MIXTURE, **DELTA, shared_expert_intermediate_size=M, layer_types=["linear_attention", "full_attention"]
        ),
        (D * (2 * 16 + 2 * 32) + D * 2 * 4 + (2 * 16 + 32) * 4 + 32 * D)  # q, k, v, z; b, a; convolution; output
        + (PROJECTIONS + D * H * E)  # its queries have a gate
        + L * (5 * D + 2 * 3 * D * M + 3 * D * M + D)
        + D * V,
        H * 2 * E,
    ),
}  # fmt: skip


def meta(config: PretrainedConfig) -> PreTrainedModel:
    return build_model(Options(), copy.deepcopy(config))


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    """6 for each weight that a token is multiplied with, and for each key half of the sequence."""
    config, weights, attention = BY_HAND[name]
    assert flops_per_token(meta(config), 10) == 6 * weights + 6 * attention * 10 / 2


@pytest.mark.parametrize("name", [name for name in BY_HAND if name != "routing depends on values"])
def test_as_torch_counts(name: str) -> None:
    """torch.utils.flop_counter in a forward and backward pass on the CPU: products of weights, to the operation.

    It also counts both halves of attention, products of the recurrence, and those of rotary embeddings.
    """
    config, weights, _ = BY_HAND[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    model.config._experts_implementation = "eager"
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(V, (1, tokens)), use_cache=False).logits.sum().backward()
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    convolution = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv1d))
    assert counts["aten.mm"] + counts.get("aten.addmm", 0) == 6 * tokens * (weights - convolution)


def test_windows() -> None:
    """w (1 - w / 2 T) keys of a query with a window of w positions in T, and half a chunk; longer than T, T / 2."""
    windows = Gemma2Config(**SIZES, sliding_window=8)  # in the first of two layers
    weights, size = BY_HAND["dense"][1], H * 2 * E
    assert flops_per_token(meta(windows), 32) == 6 * (weights + size * (8 * (1 - 8 / 64) + 16))
    assert flops_per_token(meta(windows), 8) == 6 * (weights + size * (4 + 4))
    few = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 1}
    chunks = Llama4TextConfig(**few, attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"])
    uses = count_uses(meta(chunks))
    assert not isinstance(uses, str)
    assert [call.keys(32) for call in uses.attention] == [4, 16]
    sinks = GptOssConfig(**few, sliding_window=8)
    uses = count_uses(meta(sinks))
    assert not isinstance(uses, str)
    assert [call.keys(32) for call in uses.attention] == [7, 16]


def test_a_block_that_runs_twice() -> None:
    """Weights count for each time that a token is multiplied with them: two layers with one MLP, as Zamba has."""
    model = meta(Qwen3Config(**SIZES))

    class Shared(type(model)):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.model.layers[1].mlp = self.model.layers[0].mlp

    shared = Shared(model.config)
    assert shared.num_parameters() == model.num_parameters() - 3 * D * F
    assert flops_per_token(shared, 10) == flops_per_token(model, 10)


def test_what_cannot_be_counted() -> None:
    """A mixture whose configuration does not say how many experts a token is sent to."""
    model = meta(BY_HAND["routing depends on values"][0])
    model.config.num_experts_per_tok = 0
    assert flops_per_token(model, 10) is None
    reason = "JetMoeForCausalLM cannot be counted: its configuration does not say how many experts a token is sent to"
    assert count_uses(model) == reason
    assert model_line(model).endswith(f" parameters; no MFU: {reason}")
    assert model_line(meta(BY_HAND["experts"][0])).endswith(
        f"; each token is multiplied with {BY_HAND['experts'][1]:,}"
    )
