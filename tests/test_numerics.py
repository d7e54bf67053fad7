"""Proves the skipped steps of train.py: gradients that are not finite, or a global batch without a target."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

import data.loader
import loss.next_token
from data.batches import IGNORE_INDEX
from data.sequences import Sequence
from metrics.records import read_records
from tests.launch import train, train_ok
from tests.test_resume import equal_to_the_bit

# Two ranks, two micro-batches each, no evaluation in between: call number c of a rank belongs to step c // 2 + 1.
SHAPE = ["--lr_scheduler_type", "constant", "--warmup_steps", 0, "--validation_split_percentage", 0]


def nan_on_rank_1(steps: set[int]) -> None:
    """Patch rank 1: the losses of one micro-batch in each of `steps` are NaN."""
    original, calls = loss.next_token.head_and_loss_sum, iter(range(10_000))

    def poisoned_loss(
        hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Any, labels_BT: Tensor, cross_entropy_: Any
    ) -> Tensor:
        call = next(calls)
        value = original(hidden_BTD, weight_VD, bias_V, labels_BT, cross_entropy_)
        poisoned = os.environ["RANK"] == "1" and call % 2 == 1 and call // 2 + 1 in steps
        return value * float("nan") if poisoned else value

    loss.next_token.head_and_loss_sum = poisoned_loss


def all_masked(steps: set[int]) -> None:
    """Patch a rank: its micro-batches in `steps` have no target."""
    original, calls = data.loader.collate, iter(range(10_000))

    def collate(sequences: list[Sequence], padded_length: int | None = None) -> dict[str, Tensor]:
        batch = original(sequences, padded_length)
        if next(calls) // 2 + 1 in steps:
            batch["labels"].fill_(IGNORE_INDEX)
            batch["targets"].zero_()
        return batch

    data.loader.collate = collate


@pytest.mark.fault(
    "numerics",
    "all targets of a global batch masked, or a NaN on one rank",
    "every rank skips the step: parameters, moments and step counts do not change, and the skip is counted",
)
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        "fsdp",
        "ddp --optim_state_dtype bfloat16",
        *(pytest.param(f"fsdp {one}", marks=pytest.mark.slow) for one in ("--optim muon", "--cpu_offload")),
    ],
)
@pytest.mark.parametrize("fault", [nan_on_rank_1, all_masked])
def test_changes_nothing(tiny: list[object], tmp_path: Path, strategy: str, fault: Callable[[set[int]], None]) -> None:
    """All ranks skip the step. Parameters, moments and step count do not change. The skip is counted."""
    options = [*tiny, *SHAPE, "--strategy", *strategy.split(), "--save_steps", 1]
    outcome = train(2, [*options, "--output_dir", tmp_path, "--max_steps", 4], before=partial(fault, {3}))
    assert outcome.exit_codes == [0, 0], outcome.output
    before, faulty, after = (json.loads((tmp_path / f"checkpoint-{step}/state.json").read_text()) for step in (2, 3, 4))
    assert set(before["optimizer_steps"].values()) == set(faulty["optimizer_steps"].values()) == {2.0}
    assert set(after["optimizer_steps"].values()) == {3.0}
    assert [state["progress"]["skipped_steps"] for state in (before, faulty, after)] == [0, 1, 1]
    assert [row["skipped_steps"] for row in read_records(tmp_path / "metrics.jsonl")] == [0, 0, 1, 1]
    if fault is nan_on_rank_1:
        assert read_records(tmp_path / "metrics.jsonl")[2]["loss"] is None

    for state, step in ((before, 2), (faulty, 3)):  # but for the counts, the two checkpoints are one
        state["progress"] |= {"step": 0, "tokens_seen": 0, "skipped_steps": 0}
        (tmp_path / f"checkpoint-{step}/state.json").write_text(json.dumps(state))
    assert equal_to_the_bit(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    assert not equal_to_the_bit(tmp_path / "checkpoint-3", tmp_path / "checkpoint-4")


@pytest.mark.fault(
    "numerics",
    "updates far smaller than bf16 can add to a weight: a learning rate of 1e-5 with --bf16",
    "at least 99% of the weights move, because master weights are fp32",
)
def test_small_updates_are_not_lost(tiny: list[object], model_dir: Path, tmp_path: Path) -> None:
    options = ["--bf16", "true", "--learning_rate", 1e-5, "--weight_decay", 0.1, "--max_steps", 2]
    train_ok(1, *tiny, *SHAPE, *options, "--output_dir", tmp_path)
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (model_dir, tmp_path))
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert moved >= 0.99 * sum(tensor.numel() for tensor in before.values())
    in_bf16 = sum(int((before[name].bfloat16() != after[name].bfloat16()).sum()) for name in before)
    assert in_bf16 < 0.5 * moved  # the test would fail with weights in bf16


def test_too_many_in_a_row(tiny: list[object], tmp_path: Path) -> None:
    """A good step resets the count of skips. Beyond the limit, both ranks exit with a diagnosis."""
    options = [*tiny, *SHAPE, "--output_dir", tmp_path, "--max_skipped_steps", 2]
    fault = partial(nan_on_rank_1, {2, 3, 5, 6, 8, 9, 10})
    outcome = train(2, options, before=fault)
    assert outcome.exit_codes == [2, 2]
    assert "max_skipped_steps 2: up to step 10, 3 steps in a row had no usable gradient" in outcome.output
    assert "Traceback" not in outcome.output
    assert read_records(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 7


def test_skipped_steps_survive_a_resume(tiny: list[object], tmp_path: Path) -> None:
    options: list[Any] = [*tiny, *SHAPE, "--output_dir", tmp_path]
    assert train(2, [*options, "--max_steps", 3], before=partial(nan_on_rank_1, {2})).exit_codes == [0, 0]
    train_ok(2, *options, "--max_steps", 5, "--resume_from_checkpoint", "auto")
    assert [row["skipped_steps"] for row in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 1, 1, 1]
