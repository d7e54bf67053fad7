"""Proves checkpoint/ and train.py: a run that is killed at any moment and resumed ends as the unbroken run."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import checkpoint.save
from data.ledger import differences, problems, read
from metrics.records import read_records
from tests.kills import die_at_line, kill_at_random
from tests.launch import Outcome, Ranks, train, train_ok
from tests.proof import GATES, relative_l2
from tests.test_resume import equal_to_the_bit, trajectory

RESUME = ["--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def busy(tiny: list[object]) -> list[object]:
    """A run that does everything often: it saves, prunes and evaluates, over the ends of two epochs of 8 steps."""
    steps = ["--max_steps", 20, "--save_steps", 3, "--eval_steps", 4, "--save_total_limit", 2]
    steps += ["--metric_for_best_model", "eval_loss"]
    batches = ["--global_batch_size", 96, "--per_device_train_batch_size", 24, "--per_device_eval_batch_size", 40]
    return [*tiny, *steps, *batches, "--lr_scheduler_type", "cosine", "--ledger", "--ddp_timeout", 30]


@pytest.fixture(scope="module")
def noisy(busy: list[object], model_with_dropout: Path) -> list[object]:
    """The same, with all that draws random numbers or works beside the loop."""
    more = ["--gradient_checkpointing", "--dataloader_num_workers", 1]
    return [*busy, "--model_name_or_path", model_with_dropout, *more]


Unbroken = tuple[Path, float]


def unbroken_run(options: list[object], output_dir: Path, strategy: str) -> Unbroken:
    """A run of two ranks, and the seconds between its first metrics and its end."""
    first_seen = 0.0

    def watch(ranks: object) -> None:
        nonlocal first_seen
        while not (output_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        first_seen = time.monotonic()

    outcome = train(2, [*options, "--strategy", strategy, "--output_dir", output_dir], meanwhile=watch)
    assert outcome.exit_codes == [0, 0], outcome.output
    return output_dir, time.monotonic() - first_seen


@pytest.fixture(scope="module")
def unbroken_ddp(noisy: list[object], tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return unbroken_run(noisy, tmp_path_factory.mktemp("unbroken") / "ddp", "ddp")


@pytest.fixture(scope="module")
def unbroken_fsdp(noisy: list[object], tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return unbroken_run(noisy, tmp_path_factory.mktemp("unbroken") / "fsdp", "fsdp")


def assert_identical(run: Path, unbroken: Path) -> None:
    """Parameters, moments, RNG of each rank, every row of metrics, and every row that each step learned from."""
    assert trajectory(run) == trajectory(unbroken)
    assert len([row for row in trajectory(run) if "loss" in row]) == 20
    first, second = (path / "checkpoint-20" for path in (run, unbroken))
    assert equal_to_the_bit(first, second)
    rng = [json.loads((path / "state.json").read_text())["rng"] for path in (first, second)]
    assert rng[0] == rng[1]
    assert problems(run) == differences(run, unbroken) == []
    assert len(read(run)) == 20
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-18", "checkpoint-20"]
    assert list(run.glob(".saving-*")) == []


def survive(
    options: list[object], unbroken: Unbroken, run: Path, strategy: str, seed: int, kills: int
) -> list[Outcome]:
    """Kill a run `kills` times at random moments, let it go on to its end, and compare. Gives the killed attempts."""
    draw = random.Random(seed)
    argv = [*options, "--strategy", strategy, "--output_dir", run, *RESUME]
    attempts: list[Outcome] = []
    while not attempts or (len(attempts) < kills and attempts[-1].exit_codes != [0, 0]):
        attempts.append(train(2, argv, meanwhile=partial(kill_at_random, draw, run, 20, unbroken[1])))
        assert "damaged" not in attempts[-1].output
    train_ok(2, *argv)
    assert_identical(run, unbroken[0])
    return attempts


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_random_kills(
    noisy: list[object], request: pytest.FixtureRequest, tmp_path: Path, strategy: str, seed: int
) -> None:
    """Several kills in one run: one rank or all, mid-step, mid-evaluation, in a save; then the same bits as without."""
    attempts = survive(noisy, request.getfixturevalue(f"unbroken_{strategy}"), tmp_path / "run", strategy, seed, 3)
    assert all(-signal.SIGKILL in outcome.exit_codes for outcome in attempts[:2])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_random_kills(
    noisy: list[object], unbroken_ddp: Unbroken, unbroken_fsdp: Unbroken, tmp_path: Path
) -> None:
    """Until 100 runs have been killed once at least, in a row: 100 identical runs."""
    killed = seed = 0
    while killed < 100:
        seed += 1
        strategy, unbroken = ("ddp", unbroken_ddp) if seed % 2 else ("fsdp", unbroken_fsdp)
        attempts = survive(noisy, unbroken, tmp_path / str(seed), strategy, 1000 + seed, 1)
        killed += -signal.SIGKILL in attempts[0].exit_codes


@pytest.mark.slow
def test_killed_on_changing_ranks(busy: list[object], tmp_path: Path) -> None:
    """Killed under one world size and strategy, resumed under another, five times: the same rows, curve and weights."""
    unbroken, _ = unbroken_run(busy, tmp_path / "unbroken", "ddp")
    run = tmp_path / "run"
    argv = [*busy, "--output_dir", run, *RESUME]
    topologies: list[tuple[int, list[object]]] = [
        (2, ["--strategy", "fsdp"]),
        (4, ["--strategy", "ddp", "--shard_optimizer"]),
        (1, ["--strategy", "ddp"]),
        (4, ["--strategy", "fsdp", "--replicas", 2]),
        (2, ["--strategy", "ddp"]),
    ]
    for step, (world_size, strategy) in zip(range(4, 24, 4), topologies, strict=True):
        micro_batch = ["--per_device_train_batch_size", 96 // world_size]

        def kill_when_past(ranks: Ranks, step: int = step) -> None:
            while not any(row["step"] >= step for row in read_records(run / "metrics.jsonl")):
                assert ranks[0].is_alive()
                time.sleep(0.01)
            for rank in ranks:
                rank.kill()

        train(world_size, [*argv, *strategy, *micro_batch], meanwhile=kill_when_past)
    train_ok(2, *argv)
    assert problems(run) == differences(run, unbroken) == []
    for row, reference in zip(trajectory(run), trajectory(unbroken), strict=True):
        for key in {"loss", "eval_loss"} & row.keys():
            assert row[key] == pytest.approx(reference[key], abs=GATES.loss)
    assert relative_l2(load_file(run / "model.safetensors"), load_file(unbroken / "model.safetensors")) < 1e-5


def die_in_save(count: int, rank: int) -> None:
    """Let `rank` be killed before the `count`-th line of checkpoint/ that its next save runs in its thread."""
    write = checkpoint.save._write

    def watched_write(snapshot: Any, options: Any, group: Any) -> None:
        die_at_line("checkpoint", "", count, rank)
        write(snapshot, options, group)

    checkpoint.save._write = watched_write


# A save runs some 160 lines of checkpoint/ on rank 0, which completes and prunes, and 90 on the other. Slow,
# because tests/test_atomic.py kills before each change to the disk.
@pytest.mark.fault(
    "process",
    "SIGKILL of either rank at 20 points of a save",
    "the run resumes from a valid checkpoint, and ends as an unbroken run",
)
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "lines"), [(0, range(1, 160, 8)), (1, range(1, 80, 4))])
def test_killed_at_twenty_points_of_a_save(tiny: list[object], tmp_path: Path, rank: int, lines: range) -> None:
    """Each rank is killed at 20 points of a save and of its pruning; no bad checkpoint is ever loaded."""
    steps = ["--max_steps", 100, "--save_steps", 2, "--save_total_limit", 1, "--ddp_timeout", 30]
    options = [*tiny, *steps, "--logging_steps", 2, "--lr_scheduler_type", "constant_with_warmup"]
    train_ok(2, *options, "--output_dir", tmp_path / "unbroken")
    run = tmp_path / "run"
    argv = [*options, "--output_dir", run, *RESUME]
    assert len(lines) == 20
    for count in lines:
        outcome = train(2, argv, before=partial(die_in_save, count, rank))
        assert outcome.exit_codes[rank] == -signal.SIGKILL, outcome.output
        assert "damaged" not in outcome.output
    train_ok(2, *argv)
    assert trajectory(run) == trajectory(tmp_path / "unbroken")
    assert equal_to_the_bit(run / "checkpoint-100", tmp_path / "unbroken" / "checkpoint-100")


@pytest.mark.fault(
    "process",
    "SIGKILL between micro-steps, around the optimizer step and in an evaluation",
    "tensors, random numbers, sequences and later losses are those of an unbroken run, to the bit",
)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_mid_step(noisy: list[object], request: pytest.FixtureRequest, tmp_path: Path, strategy: str) -> None:
    """Killed between micro-steps, around the optimizer step, or in an evaluation, a run ends as the unbroken one."""
    unbroken, _ = request.getfixturevalue(f"unbroken_{strategy}")
    run = tmp_path / "run"
    argv = [*noisy, "--strategy", strategy, "--output_dir", run, *RESUME]
    steps = [("loss_sum += micro_step", 11), ("optimizer.step()", 5), ("wrapped.zero_grad()", 5)]
    places = [*(("train.py", line, count) for line, count in steps), ("loss/evaluation.py", "totals[0] +=", 3)]
    for attempt, (file, line, count) in enumerate(places):
        outcome = train(2, argv, before=partial(die_at_line, file, line, count, attempt % 2))
        assert outcome.exit_codes[attempt % 2] == -signal.SIGKILL, outcome.output
    train_ok(2, *argv)
    assert_identical(run, unbroken)
