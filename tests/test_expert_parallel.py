"""Experts that are split among ranks compute what all experts on each rank compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig, Qwen3MoeConfig

from metrics.records import read_records
from tests import proof
from tests.families import SIZES
from tests.launch import train_ok
from tests.proof import GATES, REFERENCE, Case, curve, deviation, first_gradient, relative_l2

EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True}
MIXTURE = Qwen3MoeConfig(**SIZES | EXPERTS | {"vocab_size": 384, "attention_dropout": 0.0})
EP2 = (*proof.FSDP, "--expert_parallel", "2")
EP4 = (*proof.FSDP, "--expert_parallel", "4")
CHECKPOINTING = ("--gradient_checkpointing",)

CASES = [
    Case("expert parallel", 2, 8, EP2),
    Case("FSDP x expert parallel", 4, 2, EP2),
    Case("FSDP x expert parallel", 4, 4, EP2, slow=True),
    Case("expert parallel", 4, 4, EP4, slow=True),
    Case("FSDP (ZeRO-2) x expert parallel", 4, 2, (*EP2, "--reshard_after_forward", "false"), slow=True),
    Case("FSDP x expert parallel, reduce-scattered each micro-step", 4, 2, (*EP2, "--sync_each_batch"), slow=True),
    Case("FSDP x expert parallel, activation checkpointing", 4, 4, (*EP2, *CHECKPOINTING), slow=True),
]


def make_model(config: PretrainedConfig, tokenizer: Path, path: Path) -> Path:
    """A checkpoint with random values, and the files of `tokenizer`."""
    shutil.copytree(tokenizer, path, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tokenizer / "tokenizer_config.json", path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixture(tiny: list[object], model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The options of most runs, with a mixture of 4 experts."""
    model = make_model(MIXTURE, model_dir, tmp_path_factory.mktemp("mixture") / "model")
    return [*tiny, "--model_name_or_path", model]


@pytest.fixture(scope="module")
def expected(mixture: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: its first gradient, and its curve."""
    directory = tmp_path_factory.mktemp("expected")
    torch.save(first_gradient(REFERENCE, mixture, directory / "gradient"), directory / "gradient.pt")
    curve(REFERENCE, [*mixture, *proof.ADAMW], directory / "AdamW")
    return directory


@pytest.mark.parametrize("case", proof.marked(CASES))
def test_same_curve(expected: Path, mixture: list[object], tmp_path: Path, case: Case) -> None:
    """First gradient, 20 steps, evaluation, and the exported experts, which are whole again."""
    gradient = relative_l2(first_gradient(case, mixture, tmp_path / "gradient"), torch.load(expected / "gradient.pt"))
    assert gradient <= GATES.gradient
    measured = vars(deviation(curve(case, mixture, tmp_path / "curve"), expected / "AdamW", gradient))
    assert not {name: value for name, value in measured.items() if value > vars(GATES)[name]}
