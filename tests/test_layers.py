"""Proves model/layers.py: FSDP, compilation, the memory forecast and Muon agree on what a decoder layer is."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    BioGptConfig,
    CTRLConfig,
    GPTNeoXJapaneseConfig,
    MixtralConfig,
    PhimoeConfig,
    PretrainedConfig,
)

import fsdp
from config.errors import OptionError
from config.options import Options
from estimate.activations import Activations
from estimate.communication import predict_collectives
from estimate.memory import memory_by_phase
from estimate.start_block import strategy_line
from loss.next_token import NextToken
from model.build import build_model
from model.compile import compile_layers
from model.layers import decoder_layers, decoder_matrices, random_noise
from tests.families import FAMILIES

RANKS = 4
CPU = torch.device("cpu")
IDS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **IDS}

MIXTURE: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 3}

# A configuration, the class of its decoder layers and their number. transformers marks the layers of most families by
# GradientCheckpointingLayer and by _no_split_modules, of BioGPT by the former alone, of GPTNeoXJapanese by the latter
# alone, and of CTRL by neither.
MARKS: dict[str, tuple[PretrainedConfig, str, int]] = {
    "both": (FAMILIES["qwen3"][0], "Qwen3DecoderLayer", 2),
    "experts": (FAMILIES["qwen3 moe"][0], "Qwen3MoeDecoderLayer", 2),
    "checkpointing": (BioGptConfig(**SIZES, intermediate_size=48), "BioGptDecoderLayer", 3),
    "no split": (GPTNeoXJapaneseConfig(**SIZES), "GPTNeoXJapaneseLayer", 3),
    "none": (CTRLConfig(**IDS, n_embd=32, dff=48, n_layer=3, n_head=2), "", 0),
}


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """This process is rank 0 of RANKS; collectives return immediately."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_ranks")
@pytest.mark.parametrize("mark", MARKS)
def test_all_agree_on_the_layers(mark: str) -> None:
    config, name, number = MARKS[mark]
    model = build_model(Options(), copy.deepcopy(config))
    layers = decoder_layers(model)
    assert [type(layer).__name__ for layer in layers] == [name] * number
    largest = max((sum(tensor.numel() for tensor in layer.parameters()) for layer in layers), default=0)

    _, backward, *_ = memory_by_phase(model, Options(block_size=8), 1, Activations(0, 0, 0, 0, 0))
    assert backward.gradients == 4 * largest  # one layer's, in fp32, as its backward forms them
    collectives = predict_collectives(model, Options(block_size=8, strategy="fsdp"), RANKS)
    assert collectives["reduce_scatter"].calls == number + 1

    compile_layers(model, Options(), "none")
    assert [module for module in model.modules() if "forward" in vars(module)] == layers

    mesh = init_device_mesh("cpu", (1, RANKS, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    objective = fsdp.wrap(NextToken(model), layers, mesh, CPU, False, True, False)
    assert [module for module in objective.modules() if isinstance(module, FSDPModule)] == [objective, *layers]

    matrices = [tensor for layer in layers for tensor in layer.parameters() if tensor.dim() >= 2]
    assert list(map(id, decoder_matrices(model).values())) == list(map(id, matrices)), "also after wrapping"


@pytest.mark.parametrize(
    ("mark", "asked_for", "message"),
    [
        ("none", {"optim": "muon"}, "optim muon: no decoder layers are found in CTRLLMHeadModel\nremove --optim"),
        ("none", {"float8": True, "bf16": True}, "float8 true: no decoder layers are found in CTRLLMHeadModel"),
        ("none", {"bf16_residual": True, "bf16": True}, "bf16_residual true: no decoder layers are found in CTRL"),
        ("none", {"gradient_checkpointing": True}, "gradient_checkpointing true: no decoder layers are found in CTRL"),
        ("none", {"activation_memory_budget": 0.5}, "activation_memory_budget 0.5: no decoder layers are found in CT"),
        ("no split", {"gradient_checkpointing": True}, "GPTNeoXJapaneseForCausalLM does not support it\nremove --grad"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_for_layers_are_refused_without_layers(mark: str, asked_for: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        build_model(Options(**asked_for), copy.deepcopy(MARKS[mark][0]))
    assert message in str(error.value)


def test_options_for_layers_work_by_either_mark() -> None:
    for mark in ("checkpointing", "no split"):
        options = Options(optim="muon", bf16=True, bf16_residual=True, float8=True, torch_compile=True)
        options.gradient_checkpointing = mark == "checkpointing"
        build_model(options, copy.deepcopy(MARKS[mark][0]))
        assert options.torch_compile


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MixtralConfig(**MIXTURE, router_jitter_noise=0.1), "jitter_noise 0.1 in its Mixtral"),
        (PhimoeConfig(**MIXTURE, router_jitter_noise=0.2), "router_jitter_noise 0.2 in its Phimoe"),
        (MixtralConfig(**MIXTURE), ""),
    ],
    ids=["Mixtral", "PhiMoE", "none"],
)
def test_noise_of_routers_is_found(config: PretrainedConfig, expected: str) -> None:
    found = random_noise(build_model(Options(), copy.deepcopy(config)))
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_compilation_is_off_without_layers(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(torch_compile=True)
    build_model(options, copy.deepcopy(MARKS["none"][0]))
    assert not options.torch_compile
    assert capsys.readouterr().err == "torch_compile: off, because no decoder layers are found in CTRLLMHeadModel\n"


def test_start_block_says_that_a_model_is_one_unit() -> None:
    for mark, (config, _, number) in MARKS.items():
        line = strategy_line(build_model(Options(), copy.deepcopy(config)), Options(strategy="fsdp"), RANKS)
        assert line.endswith("one unit, because no decoder layers are found in CTRLLMHeadModel") == (number == 0), mark
        assert "unit" not in strategy_line(build_model(Options(), copy.deepcopy(config)), Options(), RANKS)
