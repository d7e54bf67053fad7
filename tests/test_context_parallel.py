"""Proves parallel/context.py, group.py and checks.py: split sequences compute what full sequences compute."""

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DogeConfig,
    Gemma4TextConfig,
    GPT2Config,
    GraniteSWAConfig,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from config.errors import OptionError
from config.options import Options
from data.batches import collate
from data.sequences import Sequence
from loss.next_token import NextToken
from model.build import build_model
from model.compile import compile_layers
from model.documents.attention import attention_obstacle
from parallel.checks import check_context_parallel
from parallel.context import apply_context_parallel, visible_mask
from tests.families import EXPERTS, FAMILIES, SIZES, asked_for, make_family
from tests.launch import train
from tests.proof import GATES, relative_l2

RANKS = 4
QUICK = ("qwen2", "qwen3", "gemma3")  # biases and untied; head norms and tied; a window
SPLIT = [name for name in FAMILIES if name != "gemma2"]  # it caps its attention scores


@pytest.fixture(scope="module")
def findings(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What four ranks measured for each requested family, as two groups and as one."""
    directory = tmp_path_factory.mktemp("context")
    families = {name: make_family(name, directory, model_dir) for name in asked_for(request, test_family)}
    return find(RANKS, partial(try_all, families, directory / "findings.json"), directory / "findings.json")


def find(ranks: int, instead_of_training: Callable[[], None], findings: Path) -> dict[str, Any]:
    outcome = train(ranks, [], before=instead_of_training)
    assert outcome.exit_codes == [0] * ranks, outcome.output
    found: dict[str, Any] = json.loads(findings.read_text())
    return found


def try_all(families: dict[str, Path], findings: Path) -> None:
    """Instead of train.py."""
    dist.init_process_group("gloo")
    groups = {size: dist.new_subgroups(size)[0] for size in (2, 4)}  # type: ignore[no-untyped-call]
    found = {
        name: {
            f"{size}{', documents' if documents else ''}": try_one(path, groups[size], documents)
            for size in groups
            for documents in (False, True)
        }
        for name, path in families.items()
    }
    end_with(found, findings)


def try_compiled(path: Path, findings: Path) -> None:
    """Instead of train.py."""
    dist.init_process_group("gloo")
    group = dist.new_subgroups(2)[0]  # type: ignore[no-untyped-call]
    end_with({f"documents {documents}": try_one(path, group, documents, True) for documents in (False, True)}, findings)


def end_with(found: dict[str, Any], findings: Path) -> None:
    if dist.get_rank() == 0:
        findings.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def sequence(tokens: Tensor, documents: list[int]) -> Sequence:
    """A sequence of documents of these lengths, where all tokens are trained on."""
    return Sequence(0, tokens, torch.ones(len(tokens), dtype=torch.bool), documents)


def try_one(path: Path, group: dist.ProcessGroup, documents: bool, compiled: bool = False) -> dict[str, float]:
    """Loss and gradient of sequences that are split over the ranks of `group`, against those of full sequences."""
    objective, reference = (
        NextToken(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train())
        for _ in "12"
    )
    apply_context_parallel(objective, group)
    if compiled:
        compile_layers(objective.model, Options(), "none")
    # The ranks do not divide 33 positions. Some are padding, and documents end anywhere.
    batches = []
    for offset in range(dist.get_world_size() // group.size()):
        tokens = torch.arange(99).view(3, 33) * 3 % 380 + offset
        sequences = [sequence(tokens[0], [5, 12, 16]), sequence(tokens[1][:20], [20]), sequence(tokens[2], [32, 1])]
        batch = collate(sequences, 33 if documents else None)
        batches.append({name: batch[name] for name in ("input_ids", "labels")})
        if documents:
            batches[-1] |= {name: batch[name] for name in ("position_ids", "document_ends")}
    loss = objective(**batches[dist.get_rank() // group.size()])
    loss.backward()
    gradient = {}
    for name, parameter in objective.model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        gradient[name] = parameter.grad / dist.get_world_size()  # as DDP and FSDP do
    losses = [reference(**{name: batch[name] for name in batch if name != "document_ends"}) for batch in batches]
    (torch.stack(losses).sum() / len(losses)).backward()  # type: ignore[no-untyped-call]
    expected: dict[str, Any] = {name: tensor.grad for name, tensor in reference.model.named_parameters()}
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {
        "loss": abs(total.item() / dist.get_world_size() / (sum(losses).item() / len(losses)) - 1),
        "gradient": relative_l2(gradient, expected),
        "worst": max(relative_l2({"": gradient[name]}, {"": expected[name]}) for name in expected),
    }


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPLIT]
)
def test_family(findings: dict[str, Any], name: str) -> None:
    """Groups of 2 and 4 ranks with 2 key-value heads, sequences of one document and of several, windows, experts."""
    assert len(findings[name]) == 4
    check_near(findings[name])


@pytest.mark.slow
def test_compiled(model_dir: Path, tmp_path: Path) -> None:
    check_near(find(2, partial(try_compiled, model_dir, tmp_path / "findings.json"), tmp_path / "findings.json"))


def check_near(findings: dict[str, dict[str, float]]) -> None:
    for case, found in findings.items():
        assert found["loss"] < 1e-6, case
        assert found["gradient"] < GATES.gradient, case
        assert found["worst"] < 1e-5, f"{case}: the tensor with the largest difference"


def test_visible_mask() -> None:
    """Two sequences of 5: a window of 3, and documents that end after 2 and after 9 of all 10 positions."""
    window = visible_mask(2, 5, torch.device("cpu"), None, 3)
    assert window[1, 0].sum(dim=1).tolist() == [1, 2, 3, 3, 3]
    documents = visible_mask(2, 5, torch.device("cpu"), torch.tensor([0, 2, 5, 9, 10], dtype=torch.int32), None)
    assert documents.sum(dim=-1).squeeze(1).tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 4, 1]]


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"),
    [
        ((4, 2), 2, None),
        ((4, 2), 4, None),  # two ranks need each key-value head
        ((40, 10), 4, None),
        ((4, 2), 3, "a multiple of 6, and 4 / 6 = 0.666667\npass 2, 4, or remove --context_parallel"),
        ((6, 4), 2, "a multiple of 4, and 6 / 4 = 1.5\nremove --context_parallel"),
    ],
)
def test_heads_of_each_rank(heads: tuple[int, int], ranks: int, expected: str | None) -> None:
    """Each rank gets an equal number of query heads with their key-value heads, or the error says what fits."""
    config = copy.deepcopy(FAMILIES["qwen3"][0])
    config.num_attention_heads, config.num_key_value_heads = heads
    if expected is None:
        check_context_parallel(config, ranks)
        return
    with pytest.raises(OptionError) as error:
        check_context_parallel(config, ranks)
    text = f"context_parallel {ranks}: qwen3 has {heads[0]} attention heads; {heads[1]} key-value heads and"
    assert str(error.value).startswith(text)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


REMEDY = "remove --context_parallel; --gradient_checkpointing also saves memory with long sequences"
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
SMALL = {**SIZES, "num_key_value_heads": 4}
OTHERS = {
    "gpt2": (GPT2Config(n_layer=1), "gpt2 has no plan that shows where it looks at other positions"),
    "mamba": (MambaConfig(num_hidden_layers=1), "mamba has no plan that shows where it looks at other positions"),
    "longrope": (
        LlamaConfig(**SIZES, rope_parameters={**LONGROPE, "rope_theta": 1e4, "original_max_position_embeddings": 64}),
        "llama rotates long sequences differently from short ones (longrope)",
    ),
    "heads that differ": (Gemma4TextConfig(), "the layers of gemma4_text have different numbers of heads"),
    "capped": (FAMILIES["gemma2"][0], "gemma2 is not supported: its attention function has the argument softcap"),
    "dropout": (Qwen3Config(**SIZES, attention_dropout=0.1), "its attention function has the argument dropout"),
    "sinks": (GraniteSWAConfig(**SIZES), "its attention function has the argument s_aux"),
    "a mask of its own": (DogeConfig(**SIZES), "its attention function has its own mask"),
    "windows in masks alone": (
        Qwen2MoeConfig(
            **SIZES, **EXPERTS, use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2
        ),
        "qwen2_moe is not supported: a position depends on others by more than causal attention with a window",
    ),
    "linear attention": (
        Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"]),
        "its 2 layers call a replaceable attention function 1 times",
    ),
    "narrow values": (
        DeepseekV3Config(**SMALL, n_routed_experts=4, num_experts_per_tok=1, qk_rope_head_dim=8, v_head_dim=4),
        "deepseek_v3 is not supported: its attention function has another head_dim for values",
    ),
}


def build(config: PretrainedConfig) -> None:
    """Check and build a model as train.py does."""
    check_context_parallel(config, 2)
    build_model(Options(context_parallel=2), config)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_be_split(name: str) -> None:
    """The error comes before any process group, and says what a rank could not compute from its local sequence."""
    config, expected = OTHERS[name]
    with pytest.raises(OptionError) as error:
        build(config)
    assert str(error.value).startswith("context_parallel 2: ")
    assert expected in str(error.value)
    assert str(error.value).endswith(REMEDY)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name", SPLIT)
def test_models_that_can_be_split(name: str) -> None:
    """No family that can be split is refused, and the check does not change the model."""
    model = build_model(Options(context_parallel=2), copy.deepcopy(FAMILIES[name][0]))
    assert model.config._attn_implementation == "sdpa"
    assert attention_obstacle(model) == ""


def test_attention_that_cannot_be_replaced() -> None:
    """A model with its own attention code would see its local sequence only, so it is refused."""
    model = build_model(Options(), copy.deepcopy(FAMILIES["qwen3"][0]))
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **others: (hidden_states, None)
    assert attention_obstacle(model) == "its 2 layers call a replaceable attention function 1 times"
