"""The same curve on any number of ranks, under any strategy, for any accumulation: the gates of the proof."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import metrics
from tests import proof
from tests.launch import train_ok
from tests.proof import BF16_CASES, CASES, GATES, REFERENCE, Case, curve, first_gradient, relative_l2


@pytest.fixture(scope="module")
def reference(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, the whole global batch at once: the first gradient, and a curve for each optimizer."""
    directory = tmp_path_factory.mktemp("reference")
    gradient = first_gradient(REFERENCE, tiny, directory / "gradient")
    torch.save(gradient, directory / "gradient.pt")
    curve(REFERENCE, [*tiny, *proof.ADAMW], directory / "AdamW")
    curve(REFERENCE, [*tiny, *proof.SGD], directory / "SGD")
    return directory


def name_of(case: Case) -> str:
    return f"{case.name}-{case.ranks}x{case.micro_batch}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_curve(reference: Path, tiny: list[object], tmp_path: Path, case: Case) -> None:
    """First gradient, losses, norms and evaluations of 20 steps, and the parameters after them; AdamW and SGD."""
    gradient = relative_l2(first_gradient(case, tiny, tmp_path / "gradient"), torch.load(reference / "gradient.pt"))
    for optimizer, more in (("AdamW", proof.ADAMW), ("SGD", proof.SGD)):
        run = curve(case, [*tiny, *more], tmp_path / optimizer)
        measured = dataclasses.asdict(proof.deviation(run, reference / optimizer, gradient))
        broken = {name: value for name, value in measured.items() if value > dataclasses.asdict(GATES)[name]}
        assert not broken, optimizer


def test_the_reference_learns_and_clips(reference: Path) -> None:
    for optimizer in ("AdamW", "SGD"):
        rows = metrics.read_rows(reference / optimizer / "metrics.jsonl")
        assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.3
        assert max(row["grad_norm"] for row in rows if "loss" in row) > 0.4


@pytest.mark.parametrize("case", BF16_CASES, ids=name_of)
def test_bf16_stays_near(reference: Path, tiny: list[object], tmp_path: Path, case: Case) -> None:
    """bf16 compute over fp32 masters: gradient and curve stay in a band around fp32's, and what is saved is fp32."""
    expected = torch.load(reference / "gradient.pt")
    deviation = relative_l2(first_gradient(case, tiny, tmp_path / "gradient"), expected)
    assert 1e-4 < deviation < proof.BF16_GRADIENT_GATE, "below, it would have computed in fp32"
    measured = proof.deviation(curve(case, tiny, tmp_path / "curve"), reference / "AdamW", deviation)
    assert measured.loss < 2e-2
    assert {tensor.dtype for tensor in load_file(tmp_path / "curve" / "model.safetensors").values()} == {torch.float32}


def test_a_mean_of_means_is_seen(reference: Path, tiny: list[object], tmp_path: Path) -> None:
    planted = first_gradient(Case("DDP", 2, 4), tiny, tmp_path, before=proof.mean_of_means)
    assert relative_l2(planted, torch.load(reference / "gradient.pt")) > proof.PLANTED_BUG_GATE


def test_clipping(tiny: list[object], tmp_path: Path) -> None:
    """The norm is that of the whole gradient before clipping; 0 never clips, and says the same first norm."""
    norms = {}
    for limit in (0.0, 0.4):
        train_ok(2, *tiny, "--output_dir", tmp_path / str(limit), "--max_grad_norm", limit, "--warmup_steps", 0)
        rows = metrics.read_rows(tmp_path / str(limit) / "metrics.jsonl")
        norms[limit] = [row["grad_norm"] for row in rows if "loss" in row]
    assert norms[0.0][0] == norms[0.4][0] > 0.4
    assert norms[0.0][1:] != norms[0.4][1:]
