"""Proves data/ledger.py and train.py: the same sequences on any topology, none lost or repeated by a resume."""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoTokenizer

import train
from checkpoint.identity import Progress
from config.command_line import parse
from config.plan import derive_accumulation, plan_run
from data.ledger import differences, main, problems, read
from data.prepare import prepare_data
from tests.launch import train_ok

OPTIONS = ["--ledger", "--global_batch_size", 48, "--per_device_train_batch_size", 12]
OPTIONS += ["--lr_scheduler_type", "constant_with_warmup"]
RESUME = ["--resume_from_checkpoint", "auto"]
TWO_EPOCHS = ["--max_steps", 40]  # and a bit: an epoch has 17 steps


@pytest.fixture(scope="module")
def one_process(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one")
    train_ok(1, *tiny, *OPTIONS, *TWO_EPOCHS, "--output_dir", run)
    return run


@pytest.mark.fault(
    "data",
    "sequences that the ranks or the global batch do not divide",
    "the global batches of all steps are those of one process",
)
@pytest.mark.parametrize(
    ("world_size", "micro_batch", "more"),
    [
        (2, 8, []),
        (4, 12, ["--dataloader_num_workers", 2]),
        pytest.param(3, 2, ["--strategy", "fsdp"], marks=pytest.mark.slow),
        pytest.param(4, 24, ["--strategy", "fsdp", "--tensor_parallel", 2], marks=pytest.mark.slow),
        pytest.param(4, 24, ["--context_parallel", 2], marks=pytest.mark.slow),
    ],
)
def test_the_same_global_batches(
    tiny: list[object], one_process: Path, tmp_path: Path, world_size: int, micro_batch: int, more: list[object]
) -> None:
    options = [*OPTIONS, *TWO_EPOCHS, *more, "--per_device_train_batch_size", micro_batch]
    train_ok(world_size, *tiny, *options, "--output_dir", tmp_path)
    assert len(read(tmp_path)) == 40
    assert problems(tmp_path) == differences(tmp_path, one_process) == []


def test_epochs_have_other_orders(one_process: Path) -> None:
    """Each epoch has its own order: no step of the second has the sequences of the same step in the first."""
    steps = read(one_process)
    first, second = ([steps[step + epoch * 17] for step in range(1, 18)] for epoch in (0, 1))
    assert all(sequences not in first for sequences in second)
    used = [{sequence for sequences in epoch for sequence in sequences} for epoch in (first, second)]
    assert [len(sequences) for sequences in used] == [17 * 48] * 2


def batches(tiny: list[object], rank: int = 0, world_size: int = 1, done: int = 0, end: int = 40) -> list[list[int]]:
    """The sequences that a rank reads in each step from `done` to `end`, without a training run."""
    options = parse([str(word) for word in [*tiny, *OPTIONS]], world_size)
    derive_accumulation(options, world_size)
    data = prepare_data(options, AutoTokenizer.from_pretrained(options.model_name_or_path))
    plan = plan_run(options, len(data.train), world_size)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        loader = train.training_batches(data.train, plan, options, Progress(step=done))
        micro_batches = [[next(loader)["indices"].tolist() for _ in range(plan.accumulation)] for _ in range(done, end)]
    finally:
        dist.destroy_process_group()
    return [list(chain(*step)) for step in micro_batches]


def test_batches_of_two_epochs(tiny: list[object]) -> None:
    steps = batches(tiny, end=34)
    assert not {frozenset(step) for step in steps[:17]} & {frozenset(step) for step in steps[17:]}
    assert [len(set(chain(*steps[first : first + 17]))) for first in (0, 17)] == [17 * 48] * 2


def test_batches_of_two_ranks(tiny: list[object]) -> None:
    together = [sorted(chain(*step)) for step in zip(*(batches(tiny, rank, 2) for rank in range(2)), strict=True)]
    assert together == [sorted(step) for step in batches(tiny)]


@pytest.mark.parametrize("done", [3, 20])  # in the first epoch and in the second
def test_batches_of_a_resumed_run(tiny: list[object], done: int) -> None:
    assert batches(tiny, done=done) == batches(tiny)[done:]


@pytest.mark.slow
@pytest.mark.fault(
    "data",
    "several resumes in one epoch, on other numbers of ranks",
    "no sequence is lost or comes twice",
)
def test_two_resumes_in_one_epoch(tiny: list[object], one_process: Path, tmp_path: Path) -> None:
    """No sequence is lost or repeated, also in the second epoch and when two ranks become four."""
    for world_size, steps in ((2, 3), (2, 7), (4, 12), (1, 20), (2, 25), (4, 40)):
        train_ok(world_size, *tiny, *OPTIONS, "--output_dir", tmp_path, *RESUME, "--max_steps", steps)
        assert len(read(tmp_path)) == steps
    assert problems(tmp_path) == differences(tmp_path, one_process) == []
    assert len(list((tmp_path / "ledger").glob("rank-*"))) == 4


def test_the_command(one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command sums up a correct ledger, names the faults of a wrong one, and returns 0 or 1."""
    assert main([str(one_process), str(one_process)]) == 0
    right = capsys.readouterr().out
    assert "40 steps of 48 sequences; 2 whole epochs, each with 816 of 844 sequences exactly once, and 6 steps" in right
    assert "the same global batches in all 40 steps of both" in right
    wrong = changed(one_process, tmp_path, lambda step, sequences: sequences if step != 5 else [])
    assert main([str(wrong)]) == 1
    assert capsys.readouterr().out.splitlines() == [f"{wrong}: step 5 has 0 sequences, not 48", "1 problems"]
    assert main([str(tmp_path / "nothing")]) == 2


def test_what_is_wrong_is_named(one_process: Path, tmp_path: Path) -> None:
    first = read(one_process)[1]
    again = changed(one_process, tmp_path / "again", lambda step, sequences: [*first] if step == 2 else sequences)
    assert f"sequence {first[0][0]} is in step 1 and again in step 2 of the same epoch" in problems(again)
    assert differences(again, one_process) == [f"step 2: other sequences than in {one_process}"]
    short = changed(one_process, tmp_path / "short", lambda step, sequences: sequences[1:] if step == 9 else sequences)
    assert problems(short) == ["step 9 has 47 sequences, not 48"]
    lost = changed(one_process, tmp_path / "lost", lambda step, sequences: None if step == 6 else sequences)
    assert problems(lost) == ["steps [6] are missing"]
    other = changed(
        one_process,
        tmp_path / "other",
        lambda step, sequences: [(*sequence[:2], "0") for sequence in sequences] if step == 20 else sequences,
    )
    assert len(problems(other)) > 40
    assert "has other tokens than before" in problems(other)[0]
    unknown = changed(
        one_process,
        tmp_path / "unknown",
        lambda step, sequences: [(10**9, *sequences[0][1:]), *sequences[1:]] if step == 20 else sequences,
    )
    assert f"sequence {10**9} of step 20 is not one of the " in problems(unknown)[0]


def changed(run: Path, copy: Path, change: Callable[[int, list[Any]], list[Any] | None]) -> Path:
    """A copy of a ledger with the sequences of each step changed by `change`. None removes the step."""
    shutil.copytree(run / "ledger", copy / "ledger")
    path = copy / "ledger" / "rank-0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"sequences": change(line["step"], line["sequences"])} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["sequences"] is not None))
    return copy
