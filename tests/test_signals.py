"""Proves runtime/signals.py: signals stop a run after its step, or save a checkpoint, on all ranks at the same step."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import metrics
from checkpoint.load import problems
from metrics.records import read_records
from tests.launch import ROOT, Ranks, train, train_ok
from tests.test_resume import trajectory

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.mark.fault(
    "process",
    "SIGTERM, Ctrl-C or SIGHUP to a process, to torchrun, or to torchrun and its ranks, which so have it twice",
    "a checkpoint after the step, all are gone, and the resumed run is the unbroken one",
)
@pytest.mark.parametrize(
    ("number", "launcher", "both"),
    [
        pytest.param(signal.SIGTERM, [], False, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, TORCHRUN, True, id="SIGTERM to torchrun and its ranks"),
        pytest.param(signal.SIGTERM, TORCHRUN, False, id="SIGTERM to torchrun", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [], False, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, TORCHRUN, True, id="SIGINT to torchrun and its ranks", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, TORCHRUN, True, id="SIGHUP to torchrun and its ranks", marks=pytest.mark.slow),
    ],
)
def test_stop_and_resume(
    tiny: list[object], tmp_path: Path, number: signal.Signals, launcher: list[str], both: bool
) -> None:
    """A signal to the process or to torchrun, which hands it to all of its process group, workers of loaders too.

    Then resumed on one process, against a run that nobody disturbed.
    """
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    # Slow enough to be still running: the 400 steps would take several seconds.
    options = [*tiny, "--max_steps", 400, "--lr_scheduler_type", "constant_with_warmup", "--dataloader_num_workers", 2]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, options), "--output_dir", str(stopped)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not read_records(stopped / "metrics.jsonl")[3:]:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    if both:  # as scancel does; torchrun forwards its own, so each rank gets two
        for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            os.kill(int(child), number)
    run.send_signal(number)
    _, errors = run.communicate()
    # torchrun says 1 after a signal, whatever its ranks say.
    assert run.returncode == (1 if launcher else 128 + number), errors
    assert "DataLoader worker" not in errors
    (saved,) = stopped.glob("checkpoint-*")
    assert problems(saved) == []
    step = int(saved.name.split("-")[1])
    assert read_records(stopped / "metrics.jsonl")[-1]["step"] == step < 400

    steps = ["--max_steps", step + 10, "--lr_scheduler_type", "constant_with_warmup"]
    train_ok(1, *tiny, *steps, "--output_dir", stopped, "--resume_from_checkpoint", "auto")
    train_ok(1, *tiny, *steps, "--output_dir", undisturbed)
    for row, reference in zip(trajectory(stopped), trajectory(undisturbed), strict=True):
        assert row["tokens_seen"] == reference["tokens_seen"]
        if "loss" in row:
            assert row["loss"] == pytest.approx(reference["loss"], abs=1e-5)


def wait_for_records(output_dir: Path, number: int, ranks: Ranks) -> None:
    while len(read_records(output_dir / "metrics.jsonl")) < number:
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.01)


def send(output_dir: Path, signals: list[tuple[int, signal.Signals, float]], ranks: Ranks) -> None:
    """While a run trains, send each signal to a rank, and sleep after it."""
    wait_for_records(output_dir, 3, ranks)
    for rank, number, seconds in signals:
        os.kill(ranks[rank].pid or 0, number)
        time.sleep(seconds)


def slow_steps() -> None:
    """Make each step at least a tenth of a second long, so that signals come within a step."""
    step = metrics.Recorder.step

    def slow_step(self: metrics.Recorder, tokens: int) -> None:
        time.sleep(0.1)
        step(self, tokens)

    metrics.Recorder.step = slow_step  # type: ignore[method-assign]


TERM, INT, HUP, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


@pytest.mark.parametrize(
    "signals",
    [
        # The batch system signals all processes, and torchrun all of its ranks: each gets SIGTERM twice. More may come.
        pytest.param(
            [(0, TERM, 0.0), (1, TERM, 0.0), (0, TERM, 0.05), (1, TERM, 0.0)],
            id="SIGTERM twice",
            marks=pytest.mark.slow,
        ),
        # The terminal signals its process group, and torchrun all of its ranks.
        pytest.param([(0, INT, 0.0), (1, INT, 0.0), (0, INT, 0.0), (1, INT, 0.0)], id="Ctrl-C, forwarded"),
        pytest.param([(1, HUP, 0.0)], id="SIGHUP on one rank", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_stop_and_save(
    tiny: list[object], tmp_path: Path, signals: list[tuple[int, signal.Signals, float]]
) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 300]
    outcome = train(2, argv, before=slow_steps, meanwhile=partial(send, tmp_path, signals))
    of_rank = {rank: 128 + number for rank, number, _ in signals}
    assert outcome.exit_codes == [of_rank.get(rank, 128 + TERM) for rank in (0, 1)], outcome.output
    (saved,) = tmp_path.glob("checkpoint-*")
    assert problems(saved) == []
    assert "stopped by a signal after step " in outcome.output
    told = f"{signals[0][1].name}: a checkpoint after this step, then the end; a second Ctrl-C ends the run at once\n"
    assert outcome.output.count(told) == (signals[0][0] == 0)


def test_second_ctrl_c_ends_at_once(tiny: list[object], tmp_path: Path) -> None:
    """A second SIGTERM never ends the run, although it comes late. A second Ctrl-C of a person does."""
    begun = tmp_path / "begun"

    def signal_within_step(ranks: Ranks) -> None:
        while not begun.exists():
            assert ranks[0].is_alive()
            time.sleep(0.01)
        for number, seconds in ((TERM, 1.2), (TERM, 0.2), (INT, 0.0)):
            os.kill(ranks[0].pid or 0, number)
            time.sleep(seconds)

    options = [*tiny, "--output_dir", tmp_path, "--max_steps", 300]
    outcome = train(1, options, before=partial(long_step, begun), meanwhile=signal_within_step)
    assert outcome.exit_codes == [128 + INT], outcome.output
    assert list(tmp_path.glob("checkpoint-*")) == []


def long_step(begun: Path) -> None:
    """Make the fourth step long, and write the file `begun` within it, so that all signals come within this step."""
    step, calls = metrics.Recorder.step, list[int]()

    def slow_fourth(self: metrics.Recorder, tokens: int) -> None:
        step(self, tokens)
        calls.append(tokens)
        if len(calls) == 4:
            begun.touch()
            deadline = time.monotonic() + 100
            while time.monotonic() < deadline:
                time.sleep(0.01)

    metrics.Recorder.step = slow_fourth  # type: ignore[method-assign]


@pytest.mark.fault(
    "process", "SIGUSR1 to one rank, or to all", "every rank saves the same step, and training continues"
)
def test_sigusr1_saves_and_training_continues(tiny: list[object], tmp_path: Path) -> None:
    """One rank gets the signal, all save after the same step, and the run ends as it should."""

    def ask_twice(ranks: Ranks) -> None:
        send(tmp_path, [(1, USR1, 0.0)], ranks)
        while not list(tmp_path.glob("checkpoint-*")):
            time.sleep(0.01)
        send(tmp_path, [(0, USR2, 0.0), (1, USR2, 0.0)], ranks)

    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 20, "--save_total_limit", 5]
    outcome = train(2, argv, before=slow_steps, meanwhile=ask_twice)
    assert outcome.exit_codes == [0, 0], outcome.output
    first, second, last = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert 3 <= first < second < last == 20
    assert all(problems(path) == [] for path in tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "model.safetensors").exists()
    assert outcome.output.count("SIGUSR2: a checkpoint after this step, then training continues\n") == 1


def nohup() -> None:
    signal.signal(HUP, signal.SIG_IGN)
    slow_steps()


@pytest.mark.slow
def test_nohup_is_respected(tiny: list[object], tmp_path: Path) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 10]
    outcome = train(1, argv, before=nohup, meanwhile=partial(send, tmp_path, [(0, HUP, 0.0)]))
    assert outcome.exit_codes == [0], outcome.output
    assert (tmp_path / "checkpoint-10").exists()
