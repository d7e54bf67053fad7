"""The same curve on any number of ranks, under any strategy, for any accumulation: the gates of the design."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import metrics
from tests.launch import train_ok

LOSS_GATE = NORM_GATE = PARAMETER_GATE = 1e-5


def relative_l2(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|actual - expected| / |expected| over all tensors together, in fp64."""
    assert actual.keys() == expected.keys()
    difference = sum(((actual[name].double() - expected[name].double()) ** 2).sum() for name in expected)
    return float((difference / sum((expected[name].double() ** 2).sum() for name in expected)) ** 0.5)


@pytest.fixture(scope="module")
def one_process(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one process, the whole global batch at once."""
    output_dir = tmp_path_factory.mktemp("one")
    train_ok(1, *tiny, "--output_dir", output_dir, "--per_device_train_batch_size", 16)
    return output_dir


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "extra"),
    [
        (1, 2, []),
        (2, 8, []),
        (2, 2, []),
        (4, 2, []),
        (1, 4, ["--strategy", "fsdp"]),
        (2, 4, ["--strategy", "fsdp"]),
        (4, 2, ["--strategy", "fsdp"]),
        (2, 4, ["--strategy", "fsdp", "--reshard_after_forward", "false"]),
        (2, 4, ["--gradient_checkpointing"]),
        (2, 4, ["--strategy", "fsdp", "--gradient_checkpointing"]),
    ],
    ids=lambda value: "".join(value).replace("--", " ").strip() or "ddp" if isinstance(value, list) else str(value),
)
def test_same_curve(
    one_process: Path, tiny: list[object], tmp_path: Path, world_size: int, micro_batch: int, extra: list[str]
) -> None:
    """Losses, gradient norms and evaluations of 20 AdamW steps, and the parameters after them."""
    train_ok(world_size, *tiny, "--output_dir", tmp_path, "--per_device_train_batch_size", micro_batch, *extra)
    expected, actual = metrics.read_rows(one_process / "metrics.jsonl"), metrics.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    assert [row["tokens_seen"] for row in actual] == [row["tokens_seen"] for row in expected]
    for row, reference in zip(actual, expected, strict=True):
        if "eval_loss" in row:
            assert row["eval_tokens"] == reference["eval_tokens"]
            gate = 1e-6 if row["step"] == 0 else LOSS_GATE
            assert row["eval_loss"] == pytest.approx(reference["eval_loss"], abs=gate)
        else:
            assert row["loss"] == pytest.approx(reference["loss"], abs=LOSS_GATE)
            assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=NORM_GATE)
    parameters = load_file(tmp_path / "model.safetensors")
    assert relative_l2(parameters, load_file(one_process / "model.safetensors")) < PARAMETER_GATE
    assert expected[-1]["eval_loss"] < expected[0]["eval_loss"] - 0.3, "it must have learned something"
    assert max(row["grad_norm"] for row in expected if "loss" in row) > 0.4, "gradients must have been clipped"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_stays_near(one_process: Path, tiny: list[object], tmp_path: Path, strategy: str) -> None:
    """bf16 compute over fp32 masters: the curve stays in a band around fp32's, and what is saved is fp32."""
    train_ok(2, *tiny, "--output_dir", tmp_path, "--bf16", "--strategy", strategy)
    rows, references = (
        [row for row in metrics.read_rows(path / "metrics.jsonl") if "loss" in row] for path in (tmp_path, one_process)
    )
    assert rows[0]["grad_norm"] == pytest.approx(references[0]["grad_norm"], rel=2e-2)
    assert rows[0]["grad_norm"] != pytest.approx(references[0]["grad_norm"], rel=1e-5), "it computed in fp32"
    for row, reference in zip(rows, references, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], abs=2e-2)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_clipping(tiny: list[object], tmp_path: Path) -> None:
    """The norm is that of the whole gradient before clipping; 0 never clips, and says the same first norm."""
    norms = {}
    for limit in (0.0, 0.4):
        train_ok(2, *tiny, "--output_dir", tmp_path / str(limit), "--max_grad_norm", limit, "--warmup_steps", 0)
        rows = metrics.read_rows(tmp_path / str(limit) / "metrics.jsonl")
        norms[limit] = [row["grad_norm"] for row in rows if "loss" in row]
    assert norms[0.0][0] == norms[0.4][0] > 0.4
    assert norms[0.0][1:] != norms[0.4][1:]
