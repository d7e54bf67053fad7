"""Rows divided among ranks: every family of models computes what it does on whole rows, or is refused."""

import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3NextConfig

from config import OptionError, Options
from data.batches import collate
from data.rows import Row
from model.build import check_heads
from model.compiled import compile_layers
from model.context_parallel import divide_rows, visible
from model.objective import NextToken
from tests.families import FAMILIES, make_family
from tests.launch import train
from tests.proof import GATES, relative_l2

RANKS = 4
QUICK = ("qwen2", "qwen3", "gemma3")  # with biases and untied; with norms of heads and tied; with a window
DIVIDED = [name for name in FAMILIES if name != "gemma2"]  # which caps its scores


@pytest.fixture(scope="module")
def findings(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What four ranks found of each family that is asked for, in two groups and in one; of the first, also compiled."""
    asked = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names: list[Any] = [item.callspec.params["name"] for item in asked if item.function is test_family]
    directory = tmp_path_factory.mktemp("rows")
    families = {name: make_family(name, directory, model_dir) for name in names}
    outcome = train(RANKS, [], before=partial(try_all, families, directory / "findings.json"))
    assert outcome.exit_codes == [0] * RANKS, outcome.output
    found: dict[str, Any] = json.loads((directory / "findings.json").read_text())
    return found


def try_all(families: dict[str, Path], findings: Path) -> None:
    """In the place of train.py."""
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
    found["compiled"] = {"2": try_one(next(iter(families.values())), groups[2], documents=False, compiled=True)}
    if dist.get_rank() == 0:
        findings.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def row(tokens: Tensor, documents: list[int]) -> Row:
    """Tokens of documents of these lengths, all of them learned."""
    return Row(0, tokens, torch.ones(len(tokens), dtype=torch.bool), documents)


def try_one(path: Path, group: dist.ProcessGroup, documents: bool, compiled: bool = False) -> dict[str, float]:
    """Loss and gradient of rows of which each rank of `group` has a piece, against those of whole rows."""
    objective, reference = (
        NextToken(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train())
        for _ in "12"
    )
    divide_rows(objective, group)
    if compiled:
        compile_layers(objective.model, Options())
    # 33 positions, which the ranks cannot divide, some of them padding, in documents that end anywhere.
    batches = []
    for reader in range(RANKS // group.size()):
        tokens = torch.arange(99).view(3, 33) * 3 % 380 + reader
        rows = [row(tokens[0], [5, 12, 16]), row(tokens[1][:20], [20]), row(tokens[2], [32, 1])]
        batch = collate(rows, 33 if documents else None)
        batches.append({name: batch[name] for name in ("input_ids", "labels")})
        if documents:
            batches[-1] |= {name: batch[name] for name in ("position_ids", "document_ends")}
    mine = batches[dist.get_rank() // group.size()]
    loss = objective(**mine)
    loss.backward()
    gradient = {}
    for name, parameter in objective.model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        gradient[name] = parameter.grad / RANKS  # as DDP and FSDP do
    losses = [reference(**{name: batch[name] for name in batch if name != "document_ends"}) for batch in batches]
    (torch.stack(losses).sum() / len(losses)).backward()  # type: ignore[no-untyped-call]
    expected: dict[str, Any] = {name: tensor.grad for name, tensor in reference.model.named_parameters()}
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {
        "loss": abs(total.item() / RANKS / (sum(losses).item() / len(losses)) - 1),
        "gradient": relative_l2(gradient, expected),
        "worst": max(relative_l2({"": gradient[name]}, {"": expected[name]}) for name in expected),
    }


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DIVIDED]
)
def test_family(findings: dict[str, Any], name: str) -> None:
    """Two ranks and four, which share two heads of keys; one document a row and several; windows; experts."""
    assert len(findings[name]) == 4
    for case, found in (findings[name] | findings["compiled"]).items():
        assert found["loss"] < 1e-6, case
        assert found["gradient"] < GATES.gradient, case
        assert found["worst"] < 1e-5, f"{case}: of the tensor that is furthest from its own"


def test_what_is_seen() -> None:
    """Two rows of five: a window of three, documents that end after two and after nine of ten positions."""
    rows = torch.zeros(2, 1, 5, 8)
    assert visible(rows, None, None) is None
    assert visible(rows, None, 5) is None
    window = visible(rows, None, 3)
    assert window is not None
    assert window[1, 0].sum(dim=1).tolist() == [1, 2, 3, 3, 3]
    documents = visible(rows, torch.tensor([0, 2, 5, 9, 10], dtype=torch.int32), None)
    assert documents is not None
    assert documents.sum(dim=-1).squeeze(1).tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 4, 1]]


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("qwen3", 3, "qwen3 has 4 attention heads, and 4 / 3 = 1.33333\ngive a divisor of 2, or leave it out"),
        ("six heads", 6, "qwen3 has 4 heads of keys and values, and 4 / 6 = 0.666667\ngive a divisor of 2"),
        ("gemma2", 2, "the attention of gemma2 has dropout, or caps its scores"),
        ("qwen3 next", 2, "qwen3_next has layers of linear_attention, which ranks cannot divide here"),
        ("gpt2", 2, "it is not known where gpt2 looks at other positions"),
    ],
)
def test_what_cannot_be_divided(name: str, ranks: int, expected: str) -> None:
    """Before any process group: the arithmetic, or what is not known here."""
    others = {"gpt2": GPT2Config(n_layer=1), "qwen3 next": Qwen3NextConfig(num_hidden_layers=4)}
    config = others.get(name) or copy.deepcopy(FAMILIES["qwen3" if name == "six heads" else name][0])
    if name == "six heads":
        config.num_attention_heads, config.num_key_value_heads = 6, 4
    with pytest.raises(OptionError) as error:
        check_heads(config, ranks)
    assert f"context_parallel {ranks}: {expected}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_heads_that_ranks_share() -> None:
    """Two heads of keys are enough for four ranks: each goes to two of them."""
    check_heads(FAMILIES["qwen3"][0], 4)
    check_heads(FAMILIES["qwen3"][0], 2)
