"""Proves parallel/tensor.py, group.py and checks.py: split layers compute what full layers compute."""

import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config

import fsdp
from checkpoint.export import export_model
from config.errors import OptionError
from config.options import Options
from data.batches import IGNORE_INDEX
from loss.next_token import NextToken
from model.adapt import adapt_model
from model.build import build_model, load_config_and_tokenizer
from model.layers import decoder_layers
from model.weights import Stored, find_weights, load_weights
from parallel.checks import check_tensor_parallel
from parallel.group import Group, pad_sequences
from parallel.tensor import split_on_meta
from tests.families import FAMILIES, asked_for, make_family
from tests.launch import train
from tests.proof import GATES, relative_l2
from tests.test_models import everything, same, stored

RANKS = 4
QUICK = ("qwen2", "qwen3", "gemma2")  # biases and untied; head norms and tied; capped logits
DENSE = [name for name in FAMILIES if "moe" not in name]


@pytest.fixture(scope="module")
def findings(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What 2 x 2 ranks measured for each requested family: load, one gradient, export."""
    directory = tmp_path_factory.mktemp("split")
    # Half of the vocabulary is an odd number, so the second rank of a shard has one row less. The embedding of the
    # padding token gets no gradient. Families that can have biases have them.
    sizes = {"vocab_size": 390, "pad_token_id": 201, "attention_bias": True, "mlp_bias": True}
    families = {name: make_family(name, directory, model_dir, **sizes) for name in asked_for(request, test_family)}
    outcome = train(RANKS, [], before=partial(try_all, families, directory))
    assert outcome.exit_codes == [0] * RANKS, outcome.output
    found: dict[str, Any] = json.loads((directory / "findings.json").read_text())
    return found


def try_all(families: dict[str, Path], directory: Path) -> None:
    """Instead of train.py."""
    dist.init_process_group("gloo")
    found = {name: try_one(path, directory / f"{name} exported") for name, path in families.items()}
    if dist.get_rank() == 0:
        (directory / "findings.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def try_one(path: Path, output_dir: Path) -> dict[str, Any]:
    options = Options(model_name_or_path=str(path), tensor_parallel=2, output_dir=str(output_dir))
    config, tokenizer = load_config_and_tokenizer(options)
    built = build_model(options, config)
    weights = find_weights(options, built)
    predicted = {parameter: tensor.shape for parameter, tensor in split_on_meta(built, 2).named_parameters()}
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    objective = NextToken(built)
    adapt_model(objective, options, "none", mesh)
    wrapped = fsdp.wrap(objective, decoder_layers(built), mesh, torch.device("cpu"), False, True, False)
    read = count_reads()
    load_weights(built, weights)
    owned = sum(parameter.to_local().numel() for parameter in built.parameters() if isinstance(parameter, DTensor))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    different = same(everything(built), everything(reference))

    # Two ranks do not divide 33 positions. Both ranks of a group have the same sequences.
    group = dist.get_rank() // 2
    batches = [torch.arange(99).view(3, 33) * 3 % 390 + offset for offset in range(2)]
    loss = wrapped(input_ids=batches[group], labels=batches[group])
    loss.backward()
    norm = fsdp.grad_norm(wrapped)
    gradient = {name: full(parameter.grad) for name, parameter in built.named_parameters()}
    with torch.no_grad():
        evaluated = wrapped(input_ids=batches[group], labels=batches[group])
    losses = [NextToken(reference)(input_ids=batch, labels=batch) for batch in batches]
    # FSDP averages over the groups.
    (torch.stack(losses).sum() / 2).backward()  # type: ignore[no-untyped-call]
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected_norm = torch.nn.utils.get_total_norm(list(expected.values()))

    options.save_dtype = str(FAMILIES[path.name][1]).removeprefix("torch.")  # type: ignore[assignment]
    output_dir.mkdir(exist_ok=True)
    export_model(options, built, tokenizer, [])
    return {
        "different": different,
        "mispredicted": [name for name, tensor in built.named_parameters() if split_shape(tensor) != predicted[name]],
        "read": read[0] / owned,
        "owned": owned / sum(parameter.numel() for parameter in reference.parameters()),
        "tied": built.get_output_embeddings().weight is built.get_input_embeddings().weight,
        "loss": abs(loss.item() / losses[group].item() - 1),
        "evaluated": abs(evaluated.item() / losses[group].item() - 1),
        "gradient": relative_l2(gradient, expected),
        "worst": max(relative_l2({"": gradient[name]}, {"": expected[name]}) for name in expected),
        "norm": abs(norm.item() / expected_norm.item() - 1),
        "exported": same(stored(output_dir), stored(path)),
    }


def split_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter on one rank of a tensor-parallel group, before FSDP shards it."""
    assert isinstance(parameter, DTensor)
    dimension = getattr(parameter.placements[-1], "dim", None)
    return torch.Size(size // 2 if index == dimension else size for index, size in enumerate(parameter.shape))


def full(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


def count_reads() -> list[int]:
    """A list of one number: how many elements this rank reads from files from here on."""
    elements, read = [0], Stored.read

    def count(self: Stored, *place: Any) -> Tensor:
        tensor = read(self, *place)
        elements[0] += tensor.numel()
        return tensor

    setattr(Stored, "read", count)  # noqa: B010
    return elements


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DENSE]
)
def test_family(findings: dict[str, Any], name: str) -> None:
    """Loss, gradient and files: tied and untied, biases, head norms, windows, scaled embeddings, capped logits."""
    found = findings[name]
    assert found["different"] == found["exported"] == found["mispredicted"] == []
    assert found["tied"] == FAMILIES[name][0].tie_word_embeddings
    assert found["loss"] < 1e-6
    assert found["evaluated"] < 1e-6
    assert found["norm"] < GATES.grad_norm
    assert found["gradient"] < GATES.gradient
    assert found["worst"] < 1e-5, "the tensor with the largest difference"
    assert found["read"] == 1, "a rank reads its own shards only"
    assert found["owned"] < 0.27, "a quarter, and the norms, which are replicated in each group"


def test_documents_of_padded_sequences() -> None:
    """Sequences of 5 become sequences of 6: the padding belongs to the last document of its sequence, and is masked."""
    tokens_BT = torch.arange(10).view(2, 5)
    ends = torch.tensor([0, 2, 5, 9, 10], dtype=torch.int32)
    given = {"input_ids": tokens_BT, "labels": tokens_BT, "document_ends": ends}
    _, padded = pad_sequences(Group("", 2, 0), nn.Module(), (), given)
    assert padded["document_ends"].tolist() == [0, 2, 6, 10, 12]
    assert padded["document_ends"].dtype == torch.int32
    assert padded["labels"].tolist() == [[0, 1, 2, 3, 4, IGNORE_INDEX], [5, 6, 7, 8, 9, IGNORE_INDEX]]
    assert padded["input_ids"].shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("qwen3", 4, "qwen3 has 2 key-value heads, and 2 / 4 = 0.5\npass a divisor of 2"),
        ("qwen3", 3, "qwen3 has 4 attention heads, and 4 / 3 = 1.33333\npass a divisor of 2"),
        ("llama", 2, "llama has 389 tokens in its vocabulary, and 389 / 2 = 194.5\nremove --tensor_parallel"),
        ("qwen3 moe", 2, "the plan of qwen3_moe has the unknown style moe_tp_experts for layers.*.mlp.experts"),
        ("gpt2", 2, "gpt2 has no tensor-parallel plan\nremove --tensor_parallel"),
    ],
)
def test_models_that_cannot_be_split(name: str, ranks: int, expected: str) -> None:
    """The error comes before any process group, and names the sizes or the unknown style."""
    config = copy.deepcopy(FAMILIES[name][0]) if name in FAMILIES else GPT2Config(n_layer=1)
    if name == "qwen3":
        config.vocab_size = 384
    with pytest.raises(OptionError) as error:
        check_tensor_parallel(config, ranks)
    assert f"tensor_parallel {ranks}: {expected}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_plan_must_name_every_projection() -> None:
    config = copy.deepcopy(FAMILIES["qwen3"][0])
    config.vocab_size = 384
    build_model(Options(tensor_parallel=2), config)
    plan = dict(config.base_model_tp_plan)
    del plan["layers.*.mlp.up_proj"]
    config.base_model_tp_plan = plan
    with pytest.raises(OptionError, match=r"leaves out model\.layers\.0\.mlp\.up_proj\n"):
        build_model(Options(tensor_parallel=2), config)
