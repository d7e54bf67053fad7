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
    assert expected[-1]["eval_loss"] < expected[0]["eval_loss"] - 0.5, "it must have learned something"
