"""Proves loss/router.py: the load-balancing loss of transformers, over the global batch, and the load of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from config.command_line import parse
from config.errors import OptionError
from data.prepare import prepare_data
from loss.next_token import NextToken
from loss.router import RouterBias, build_router_balance, build_router_bias
from metrics.records import read_records
from tests import zoo
from tests.launch import train_ok

SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0, "num_experts_per_tok": 2},
    **{"output_router_logits": True, "router_aux_loss_coef": 0.5},
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16),
}


@pytest.fixture(params=CONFIGS)
def mixture(request: pytest.FixtureRequest, tiny: list[object], tmp_path: Path) -> list[object]:
    """The options of a run of a mixture whose configuration asks for the loss. Its routers prefer some experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or "router" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(tmp_path / "model")
    position = tiny.index("--model_name_or_path") + 1
    AutoTokenizer.from_pretrained(tiny[position]).save_pretrained(tmp_path / "model")
    return [*tiny[:position], tmp_path / "model", *tiny[position + 1 :]]


def records(output_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(output_dir / "metrics.jsonl") if "loss" in record]


def test_first_loss_is_that_of_transformers(mixture: list[object], tmp_path: Path) -> None:
    """Value and gradient norm of the first step, where all sequences are one micro-batch, and loads counted by hand."""
    whole = [*mixture, "--packing", "concat", "--per_device_train_batch_size", 16, "--max_steps", 1]
    train_ok(1, *whole, "--output_dir", tmp_path / "run")
    (record,) = records(tmp_path / "run")

    options = parse([str(word) for word in whole])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    data = prepare_data(options, AutoTokenizer.from_pretrained(tmp_path / "model"))
    sampler: Any = torch.utils.data.DistributedSampler(data.train, 1, 0, seed=options.seed)
    ids_BT = torch.stack([data.train[number].tokens for number in list(sampler)[:16]]).long()
    outputs = model(input_ids=ids_BT, labels=ids_BT, output_router_logits=True, use_cache=False)
    outputs.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert record["loss"] == pytest.approx(outputs.loss.item(), abs=1e-5)
    assert record["router_aux_loss"] == pytest.approx(outputs.aux_loss.item(), abs=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    chosen = [logits.softmax(-1).topk(2).indices.flatten() for logits in outputs.router_logits]
    loads = torch.stack([indices.bincount(minlength=4) for indices in chosen]).double()
    assert record["expert_load_max"] == pytest.approx((loads / loads.mean(1, keepdim=True)).max().item())
    assert record["experts_unused"] == (loads == 0).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_one_curve_on_any_topology(mixture: list[object], tmp_path: Path) -> None:
    """16 sequences with padding in one micro-batch, in micro-steps, on two ranks, sharded, and recomputed."""
    shapes: dict[str, tuple[int, list[object]]] = {
        "one": (1, ["--per_device_train_batch_size", 16]),
        "micro-steps": (1, ["--per_device_train_batch_size", 4]),
        "two ranks": (2, ["--per_device_train_batch_size", 8]),
        "sharded": (2, ["--per_device_train_batch_size", 2, "--strategy", "fsdp", "--gradient_checkpointing"]),
    }
    for name, (ranks, options) in shapes.items():
        train_ok(ranks, *mixture, *options, "--max_steps", 5, "--output_dir", tmp_path / name)
    for name in shapes:
        for record, reference in zip(records(tmp_path / name), records(tmp_path / "one"), strict=True):
            for field in ("loss", "router_aux_loss", "grad_norm", "expert_load_max", "experts_unused"):
                assert record[field] == pytest.approx(reference[field], rel=1e-5, abs=1e-5), (name, field)


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_the_option_wins_over_the_configuration(mixture: list[object], tmp_path: Path) -> None:
    losses = {}
    for coefficient in (None, 0.5, 0, 0.1):
        options = [] if coefficient is None else ["--router_aux_loss_coef", coefficient]
        train_ok(1, *mixture, *options, "--max_steps", 2, "--output_dir", tmp_path / str(coefficient))
        losses[coefficient] = records(tmp_path / str(coefficient))
    assert [record["loss"] for record in losses[None]] == [record["loss"] for record in losses[0.5]]
    assert "router_aux_loss" not in losses[0][0]
    assert losses[0][0]["expert_load_max"] == losses[0.5][0]["expert_load_max"] >= 1
    plain, aux = losses[0][0]["loss"], losses[0.5][0]["router_aux_loss"]
    for coefficient in (0.1, 0.5):
        assert losses[coefficient][0]["loss"] == pytest.approx(plain + coefficient * aux, abs=1e-5)


def test_refusals(model_dir: Path, tmp_path: Path) -> None:
    """A dense model, and combinations that would compute another loss."""
    dense = AutoModelForCausalLM.from_pretrained(model_dir)
    asked = ["--config_name", "x", "--router_aux_loss_coef", "0.1"]
    with pytest.raises(OptionError, match=r"router_aux_loss_coef 0\.1: qwen3 has no load-balancing loss"):
        build_router_balance(dense, parse(asked))
    assert build_router_balance(dense, parse(asked[:2])) is None
    for name, coefficient in (("doge", True), ("granitemoe", False)):  # another formula; no logits in transformers
        model = AutoModelForCausalLM.from_config(zoo.config(name))
        if coefficient:
            with pytest.raises(OptionError, match="doge has no load-balancing loss"):
                build_router_balance(model, parse(asked))
            continue
        balance = build_router_balance(model, parse(asked))
        assert balance is not None
        ids_BT = torch.randint(1, 500, (2, 8))
        with pytest.raises(OptionError, match="this model does not give the logits of its routers"):
            NextToken(model, router_balance=balance)(ids_BT, ids_BT, tokens=torch.tensor([8, 8]))
    mixture = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    for other in (["--context_parallel", "2"], ["--objective", "dpo"]):
        with pytest.raises(OptionError, match=r"coef 0\.5 of the model's configuration: cannot be combined"):
            build_router_balance(mixture, parse([*asked[:2], *other]))


def test_bias_moves_against_the_load(tiny: list[object], tmp_path: Path) -> None:
    """Biases of GLM-4.5 after each step, on any topology, against a count by hand; saved, resumed, and exported."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo.config("glm4_moe"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    position = tiny.index("--model_name_or_path") + 1
    AutoTokenizer.from_pretrained(tiny[position]).save_pretrained(tmp_path / "model")
    options = [*tiny[:position], tmp_path / "model", *tiny[position + 1 :], "--router_bias_update_rate", 0.01]
    biases = {}
    for name, ranks, micro_batch, more in (
        ("one", 1, 16, []),
        ("two", 2, 2, ["--strategy", "fsdp", "--gradient_checkpointing"]),
        ("resumed", 1, 8, ["--save_steps", 2]),
    ):
        argv = [*options, "--per_device_train_batch_size", micro_batch, *more, "--output_dir", tmp_path / name]
        argv += ["--lr_scheduler_type", "constant_with_warmup"]
        if name == "resumed":
            train_ok(1, *argv, "--max_steps", 2)
            argv += ["--resume_from_checkpoint", "auto"]
        train_ok(ranks, *argv, "--max_steps", 4)
        tensors = load_file(tmp_path / name / "model.safetensors")
        biases[name] = {key: value for key, value in tensors.items() if key.endswith("e_score_correction_bias")}
    assert biases["one"]
    for key, bias_E in biases["one"].items():
        assert torch.equal(bias_E, biases["two"][key])
        assert torch.equal(bias_E, biases["resumed"][key])
        assert bias_E.abs().max() > 0.005
        torch.testing.assert_close((bias_E / 0.01).round(), bias_E / 0.01, atol=1e-4, rtol=0)


def test_one_move_of_the_bias() -> None:
    """Rises below the mean of its layer, falls above, stays at it, and does not move in a skipped step."""
    model = AutoModelForCausalLM.from_config(zoo.config("glm4_moe"))
    bias = RouterBias(model, 0.5)
    counts = torch.tensor([[3, 1, 2, 2]] * len(bias.owners))
    for skip, expected in ((True, [0.0, 0, 0, 0]), (False, [-0.5, 0.5, 0, 0])):
        bias.counts = list(counts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.all_reduce", lambda tensor: None)
            bias.update(torch.tensor(skip))
        for owner, name in bias.owners:
            assert owner.get_buffer(name).tolist() == expected
    mixtral = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    with pytest.raises(OptionError, match=r"router_bias_update_rate 0\.1: mixtral has no bias of its routers"):
        build_router_bias(mixtral, parse(["--config_name", "x", "--router_bias_update_rate", "0.1"]))
