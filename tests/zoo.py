"""Tiny configurations of the model families of transformers that people train, with each kind of layer they have.

Windows and chunks are shorter than the sequences of the tests. Sizes are multiples of 8, as kernels need them.
"""

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

COMMON: dict[str, Any] = {
    **{"vocab_size": 512, "max_position_embeddings": 256, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0},
    # Other names of these sizes.
    **{"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "d_model": 32, "n_layers": 3, "n_heads": 4},
    **{
        "max_seq_len": 256,
        "num_layers": 3,
        "num_heads": 4,
        "attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    **{"ffn_hidden_size": 48, "rotary_dim": 4},
    # Windows.
    **{"sliding_window": 6, "attention_chunk_size": 6, "window_size": 6},
    # Experts.
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "moe_k": 2},
    # Low-rank attention.
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    # Linear attention, state-space models.
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_conv_kernel_dim": 4, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4, "chunk_size": 16},
    **{"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"mamba_d_conv": 4, "mamba_chunk_size": 16, "mamba_dt_rank": 4},
}
LOW_RANK: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}  # no groups of query heads
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
NEMOTRON: dict[str, Any] = {
    **{"layers_block_type": ["linear_attention", "full_attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{"n_groups": 1, "moe_shared_expert_intermediate_size": 16},
}
ZAMBA: dict[str, Any] = {
    **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    **{
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 8,
    },
}
GEMMA_3N: dict[str, Any] = {
    **{"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_kv_shared_layers": 0},
    **{"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    **{"intermediate_size": [48] * 3, "activation_sparsity_pattern": [0.0] * 3},
}
GEMMA_4: dict[str, Any] = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "global_head_dim": 16}
QWEN_4: dict[str, Any] = {
    **HYBRID,
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16},
    **{"indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 64},
    **{"heads_per_ngram": 2, "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8},
}

# The families of today first, as in docs/models.md, with values that they need beside COMMON.
SPECIAL: dict[str, dict[str, Any]] = {
    **{"qwen2": {}, "qwen3": {}, "qwen3_moe": {}, "qwen3_next": HYBRID, "qwen3_5_text": HYBRID},
    **{"qwen3_5_moe_text": HYBRID, "qwen2_moe": {}, "llama": {}},
    "llama4_text": {"no_rope_layers": [1, 1, 0], "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    **{"mistral": {}, "ministral": {}, "ministral3": {}, "mixtral": {}, "gemma": {}},
    **{"gemma2": {}, "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}},
    "gpt_oss": {},
    "deepseek_v2": LOW_RANK | {"first_k_dense_replace": 1},
    "deepseek_v3": LOW_RANK | {"first_k_dense_replace": 1},
    **{"glm": {}, "glm4": {}, "glm4_moe": {"first_k_dense_replace": 1}},
    "glm4_moe_lite": LOW_RANK,
    **{"granite": {}, "granitemoe": {}, "granitemoeshared": {"shared_intermediate_size": 16}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "kimi_linear": LOW_RANK
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_head_dim": 8}
    | {"linear_num_heads": 4, "num_experts_per_token": 2},
    **{"phi": {}, "phi3": {}, "phimoe": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": {}, "olmo_hybrid": HYBRID},
    **{
        "flex_olmo": {},
        "smollm3": {},
        "starcoder2": {},
        "stablelm": {},
        "seed_oss": {},
        "exaone4": {},
        "exaone_moe": {},
    },
    **{"ernie4_5": {}, "ernie4_5_moe": {}, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {}},
    **{"minimax": {}, "minimax_m2": {}, "dots1": {"n_shared_experts": 1}, "cohere": {}, "cohere2": {}},
    **{"nemotron": {}, "nemotron_h": NEMOTRON, "apertus": {}, "arcee": {}, "helium": {}},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    **{"mamba": {}, "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2}, "falcon_mamba": {}},
    **{"recurrent_gemma": {}, "rwkv": {}, "zamba2": ZAMBA},
    **{
        "afmoe": {},
        "bitnet": {},
        "doge": {},
        "diffllama": {},
        "jetmoe": {"kv_channels": 8},
        "longcat_flash": LOW_RANK | {"expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
        "nanochat": {},
    },
    **{"vaultgemma": {}, "youtu": LOW_RANK, "mimo_v2_flash": {}, "jais2": {}, "solar_open": {}, "granite_swa": {}},
    "qwen4_exp_text": QWEN_4,
    "modernbert-decoder": dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0),
    **{"minicpm3": LOW_RANK, "hy_v3": {}, "laguna": {}, "mellum": {}, "axk1": LOW_RANK},
    **{"falcon": {}, "gpt2": {}, "gpt_neox": {}, "gptj": {}, "gpt_bigcode": {}, "bloom": {}, "mpt": {}, "opt": {}},
    **{"codegen": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2}},
    **{"persimmon": {}, "xglm": {}, "biogpt": {}},
}
NAMES = tuple(SPECIAL)
RANDOM = re.compile("drop|jitter")  # options of configurations that make a forward random


def config(name: str) -> PretrainedConfig:
    """A tiny configuration of the family `name`, without dropout or other noise, so that runs can be compared."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    quiet = {key: type(value)(0) for key, value in vars(default).items() if RANDOM.search(key) and value}
    values = {key: value for key, value in COMMON.items() if key in vars(default) or hasattr(kind, key)}
    settable = {key: value for key, value in values.items() if not isinstance(getattr(kind, key, None), property)}
    result: PretrainedConfig = kind(**settable | quiet | SPECIAL[name])
    return result
