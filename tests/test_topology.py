"""Proves train.py with ddp/, fsdp/ and parallel/: one curve for any ranks, strategy or micro-steps (tests/proof.py)."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ddp
import ddp.optimizer
from config.command_line import parse
from config.options import Options
from data.prepare import prepare_data
from estimate.communication import predict_collectives
from loss.next_token import NextToken
from metrics.records import read_records
from model.build import build_model, load_config_and_tokenizer
from model.layers import decoder_layers
from tests import proof
from tests.launch import train, train_ok
from tests.proof import (
    BF16_CASES,
    CASES,
    GATES,
    REFERENCE,
    Case,
    curve,
    first_gradient,
    marked,
    read_tensors,
    relative_l2,
)


@pytest.mark.parametrize("case", marked(CASES))
def test_same_curve(reference: Path, tiny: list[object], tmp_path: Path, case: Case) -> None:
    """First gradient, losses, gradient norms and evaluation of 20 AdamW steps, and the parameters after them."""
    gradient = relative_l2(first_gradient(case, tiny, tmp_path / "gradient"), torch.load(reference / "gradient.pt"))
    assert gradient <= GATES.gradient  # first, so that a planted bug fails before 20 steps
    check_gates(curve(case, [*tiny, *proof.ADAMW], tmp_path / "AdamW"), reference / "AdamW")


SGD_IN_SECONDS = (Case("DDP", 2, 8), Case("FSDP", 2, 8, proof.FSDP))


@pytest.mark.parametrize("case", marked([dataclasses.replace(case, slow=case not in SGD_IN_SECONDS) for case in CASES]))
def test_same_curve_of_sgd(reference: Path, tiny: list[object], tmp_path: Path, case: Case) -> None:
    """SGD shows a gradient that is wrong by a factor in all 20 steps. With AdamW, only the first gradient shows it."""
    check_gates(curve(case, [*tiny, *proof.SGD], tmp_path / "SGD"), reference / "SGD")


def check_gates(run: Path, reference: Path) -> None:
    measured = dataclasses.asdict(proof.deviation(run, reference, gradient=0.0))
    assert not {name: value for name, value in measured.items() if value > dataclasses.asdict(GATES)[name]}


def test_the_reference_learns_and_clips(reference: Path) -> None:
    for optimizer in ("AdamW", "SGD"):
        records = read_records(reference / optimizer / "metrics.jsonl")
        assert records[-1]["eval_loss"] < records[0]["eval_loss"] - 0.3
        assert max(record["grad_norm"] for record in records if "loss" in record) > 0.4


@pytest.mark.parametrize("case", marked(BF16_CASES))
def test_bf16_stays_near(reference: Path, tiny: list[object], tmp_path: Path, case: Case) -> None:
    """bf16 compute with fp32 master weights: gradient and curve stay near those of fp32, and checkpoints are fp32."""
    expected = torch.load(reference / "gradient.pt")
    deviation = relative_l2(first_gradient(case, tiny, tmp_path / "gradient"), expected)
    assert 1e-4 < deviation < proof.BF16_GRADIENT_GATE, "a smaller deviation means that it computed in fp32"
    measured = proof.deviation(curve(case, tiny, tmp_path / "curve"), reference / "AdamW", deviation)
    assert measured.loss < 2e-2
    saved = read_tensors(tmp_path / "curve" / "checkpoint-20" / "model")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_mean_of_means_is_seen(reference: Path, tiny: list[object], tmp_path: Path) -> None:
    planted = first_gradient(Case("DDP", 2, 4), tiny, tmp_path, before=proof.mean_of_means)
    assert relative_l2(planted, torch.load(reference / "gradient.pt")) > proof.PLANTED_BUG_GATE


def record_gathers(directory: Path, bucket: int) -> None:
    """Patch a rank: buckets of `bucket` bytes; write down the bytes of all-gathers, and the parameters after a step."""
    ddp.optimizer.BUCKET = bucket
    gather, all_gather, sizes = ddp.gather_parameters, dist.all_gather_into_tensor, []

    def all_gather_into_tensor(gathered: Tensor, shard: Tensor) -> None:
        assert shard.numel() * dist.get_world_size() == gathered.numel()
        sizes.append(gathered.nbytes)
        all_gather(gathered, shard)

    def gather_parameters(optimizer: torch.optim.Optimizer) -> None:
        sizes.clear()
        gather(optimizer)
        groups = optimizer.param_groups
        parameters = [each.detach() for group in groups for each in group.get("replicated", group["params"])]
        torch.save(parameters, directory / f"parameters-{os.environ['RANK']}")
        (directory / f"sizes-{os.environ['RANK']}").write_text(json.dumps(sizes))

    dist.all_gather_into_tensor = all_gather_into_tensor  # type: ignore[assignment]
    ddp.gather_parameters = gather_parameters


@pytest.mark.parametrize(
    ("ranks", "bucket"),
    [(3, 10_000), pytest.param(4, 1_000, marks=pytest.mark.slow), pytest.param(1, 10_000, marks=pytest.mark.slow)],
)
def test_buckets_of_a_sharded_optimizer(
    tiny: list[object], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, bucket: int
) -> None:
    """On all ranks, the parameters of plain DDP to the bit; three ranks cannot divide any rows. Buckets as predicted.

    A bucket ends within a row or a shard, or holds several parameters. A single rank communicates nothing.
    """
    options = [*tiny, "--global_batch_size", 12, "--per_device_train_batch_size", 1, "--max_steps", 3]
    for name, extra in (("plain", []), ("sharded", ["--shard_optimizer"])):
        (tmp_path / name).mkdir()
        before = partial(record_gathers, tmp_path / name, bucket)
        outcome = train(ranks, [*options, *extra, "--output_dir", tmp_path / name / "run"], before=before)
        assert outcome.exit_codes == [0] * ranks, outcome.output
    expected = torch.load(tmp_path / "plain" / "parameters-0")
    monkeypatch.setattr("ddp.optimizer.BUCKET", bucket)
    model = build_model(Options(), AutoConfig.from_pretrained(model_dir))
    predicted: Any = predict_collectives(model, Options(block_size=64, shard_optimizer=True), ranks)
    for rank in range(ranks):
        parameters = torch.load(tmp_path / "sharded" / f"parameters-{rank}")
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected, strict=True))
        sizes = json.loads((tmp_path / "sharded" / f"sizes-{rank}").read_text())
        assert (len(sizes), sum(sizes)) == (predicted["all_gather"] if ranks > 1 else (0, 0))
        assert len(sizes) > 10 or ranks == 1
        assert len(set(sizes[:-1])) <= 1


def test_clipping(tiny: list[object], tmp_path: Path) -> None:
    """The norm is that of the full gradient before clipping. 0 never clips, and reports the same first norm."""
    norms, short = {}, ["--warmup_steps", 0, "--max_steps", 4]
    for limit in (0.0, 0.4):
        train_ok(2, *tiny, "--output_dir", tmp_path / str(limit), "--max_grad_norm", limit, *short)
        records = read_records(tmp_path / str(limit) / "metrics.jsonl")
        norms[limit] = [record["grad_norm"] for record in records if "loss" in record]
    assert norms[0.0][0] == norms[0.4][0] > 0.4
    assert norms[0.0][1:] != norms[0.4][1:]


def test_random_weights_do_not_depend_on_ranks(tiny: list[object], model_dir: Path, tmp_path: Path) -> None:
    """One seed gives one model: random weights have the same first evaluation on two FSDP ranks as on one rank."""
    options = ["--config_name", model_dir, "--tokenizer_name", model_dir, *tiny[2:], "--max_steps", 1]
    train_ok(1, *options, "--output_dir", tmp_path / "one")
    train_ok(2, *options, "--output_dir", tmp_path / "two", "--strategy", "fsdp")
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl")[0]["eval_loss"] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, abs=GATES.evaluation)


def test_wrapping_keeps_the_head_tied(tiny: list[object]) -> None:
    """One tensor for embedding and head, also when a model leaves the meta device."""
    options = parse([str(word) for word in tiny])
    model = build_model(options, load_config_and_tokenizer(options)[0])
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("replicate", "shard", "tensor"))
        ddp.wrap(NextToken(model), decoder_layers(model), mesh, torch.device("cpu"), False, True, False)
    finally:
        dist.destroy_process_group()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_evaluation_changes_nothing(
    tiny: list[object], model_with_dropout: Path, train_file: Path, tmp_path: Path
) -> None:
    """With dropout, evaluations in between leave the training losses bit-equal."""
    options = [*tiny, "--model_name_or_path", model_with_dropout, "--max_steps", 6]
    train_ok(2, *options, "--output_dir", tmp_path / "with", "--validation_file", train_file, "--eval_steps", 2)
    train_ok(2, *options, "--output_dir", tmp_path / "without", "--validation_split_percentage", 0)
    losses = [
        [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl") if "loss" in record]
        for name in ("with", "without")
    ]
    assert losses[0] == losses[1]


@pytest.mark.fault(
    "numerics",
    "gradient checkpointing with dropout",
    "the second forward pass draws the same dropout: the same gradient",
)
def test_checkpointing_repeats_the_dropout(tiny: list[object], model_with_dropout: Path, tmp_path: Path) -> None:
    """Activation checkpointing gives the same gradient, because the recomputed forward pass draws the same dropout."""
    options = [*tiny, "--model_name_or_path", model_with_dropout]
    expected = first_gradient(REFERENCE, options, tmp_path / "off")
    checkpointed = dataclasses.replace(REFERENCE, options=("--gradient_checkpointing",))
    assert relative_l2(first_gradient(checkpointed, options, tmp_path / "on"), expected) < GATES.gradient
    assert relative_l2(first_gradient(REFERENCE, tiny, tmp_path / "no dropout"), expected) > 1e-2


def test_the_exported_model_is_the_trained_one(tiny: list[object], tmp_path: Path) -> None:
    """transformers loads the exported model and computes, with its own loss, the reported evaluation loss."""
    train_ok(2, *tiny, "--output_dir", tmp_path, "--max_steps", 6, "--strategy", "fsdp")
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    sequences = prepare_data(parse(list(map(str, tiny))), AutoTokenizer.from_pretrained(tmp_path)).validation["eval"]
    total = targets = 0.0
    with torch.no_grad():
        for tokens in (sequences[index].tokens for index in range(len(sequences))):
            if len(tokens) > 1:
                total += loaded(input_ids=tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1)
                targets += len(tokens) - 1
    evaluation = read_records(tmp_path / "metrics.jsonl")[-1]
    assert targets == evaluation["eval_tokens"]
    assert total / targets == pytest.approx(evaluation["eval_loss"], abs=1e-5)
