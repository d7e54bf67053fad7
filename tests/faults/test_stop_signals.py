"""Proves runtime/signals.py in every phase of a run: imports, preparation, rendezvous, weights, export, the end.

tests/test_signals.py and test_saving.py have the phases of the loop: steps, evaluations and saves.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.load import problems
from metrics import Recorder
from metrics.records import read_records
from runtime import stop_requested
from tests.faults.test_batch_systems import processes_of, same_curve, steps_of, wait_for
from tests.kills import at_line
from tests.launch import ROOT, Ranks, train, train_ok
from tests.test_resume import equal_to_the_bit, trajectory

TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
NOTHING_TO_SAVE = "ended before the first step, there is nothing to save\n"


def start(argv: list[object], *launcher: str, **keywords: Any) -> "subprocess.Popen[str]":
    """Start train.py, or a launcher with it, as a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **(pipes | keywords))


@pytest.mark.parametrize("number", [INT, pytest.param(TERM, marks=pytest.mark.slow)])
@pytest.mark.fault(
    "process",
    "Ctrl-C, SIGTERM or SIGHUP while train.py still imports torch",
    "one line, no traceback, exit code 128 + the signal",
)
def test_during_imports(tmp_path: Path, number: signal.Signals) -> None:
    run = start(["--output_dir", tmp_path / "run"])
    wait_for(lambda: b"libtorch" in Path(f"/proc/{run.pid}/maps").read_bytes(), run)
    run.send_signal(number)
    output, _ = run.communicate(timeout=100)
    assert (run.returncode, output) == (128 + number, f"{number.name}: {NOTHING_TO_SAVE}")


def signal_at(file: str, line: str, number: signal.Signals, waits: bool) -> None:
    """Patch a rank: at that line, signal its children and it. If `waits`, it gets no further before it is answered."""

    def act() -> None:
        pid = os.getpid()
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), number)
        os.kill(pid, number)
        if waits:
            threading.Event().wait(100)

    at_line(file, line, 1, 0, act)


@pytest.mark.parametrize(
    ("file", "line", "number"),
    [
        pytest.param("data/cache.py", "tokens_file.write(", TERM, id="tokenization"),
        pytest.param("train.py", "model = build_model(", INT, id="model", marks=pytest.mark.slow),
        pytest.param("train.py", "dist.init_process_group(", HUP, id="rendezvous", marks=pytest.mark.slow),
        pytest.param("train.py", "load_weights(model", INT, id="weights", marks=pytest.mark.slow),
        pytest.param("train.py", "saver = checkpoint.Saver(", TERM, id="just before the loop", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(
    "process",
    "SIGTERM, Ctrl-C or SIGHUP during tokenization, model build, rendezvous or the loading of weights",
    "one line, no traceback, exit code 128 + the signal; the same command then trains",
)
def test_before_the_loop(tiny: list[object], tmp_path: Path, file: str, line: str, number: signal.Signals) -> None:
    text = tmp_path / "text.jsonl"  # two chunks, for two processes that tokenize
    text.write_text(Path(str(tiny[tiny.index("--train_file") + 1])).read_text() * 16)
    argv = [*tiny, "--data_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", "--max_steps", 2]
    argv += ["--train_file", text, "--preprocessing_num_workers", 2, "--resume_from_checkpoint", "auto"]
    outcome = train(1, argv, before=partial(signal_at, file, line, number, True))
    assert outcome.exit_codes == [128 + number], outcome.output
    assert outcome.output.endswith(f"{number.name}: {NOTHING_TO_SAVE}")
    assert "Traceback" not in outcome.output
    train_ok(1, *argv)


@pytest.mark.slow
@pytest.mark.fault(
    "process",
    "a process that tokenizes is killed, as for lack of memory",
    "a message, exit code 2; the same command then trains",
)
def test_killed_tokenizer(tiny: list[object], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(Path(str(tiny[tiny.index("--train_file") + 1])).read_text() * 64)
    argv = [*tiny, "--data_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", "--max_steps", 2]
    argv += ["--train_file", text, "--preprocessing_num_workers", 2]
    outcome = train(1, argv, before=kill_child)
    assert outcome.exit_codes == [2], outcome.output
    assert "preprocessing_num_workers 2: a process that tokenizes was killed" in outcome.output
    assert "Traceback" not in outcome.output
    train_ok(1, *argv)


def kill_child() -> None:
    """Patch a rank: after its first chunk, it loses one of the processes that tokenize."""

    def act() -> None:
        pid = os.getpid()
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        os.kill(int(child), signal.SIGKILL)

    at_line("data/cache.py", "tokens_file.write(", 1, 0, act)


@pytest.mark.fault(
    "process",
    "SIGTERM to a rank that waits for the others to start",
    "it ends at once, although it waits in C++",
)
def test_in_the_rendezvous(tiny: list[object], tmp_path: Path) -> None:
    """Rank 0 does not come before rank 1 has ended."""
    waiting, ended = tmp_path / "waiting", tmp_path / "ended"

    def signal_waiting(ranks: Ranks) -> None:
        deadline = time.monotonic() + 100
        while not waiting.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        wait_for_cpp(ranks[1].pid or 0)
        os.kill(ranks[1].pid or 0, TERM)
        ranks[1].join(timeout=60)
        ended.touch()
        assert ranks[1].exitcode == 128 + TERM
        os.kill(ranks[0].pid or 0, TERM)

    argv = [*tiny, "--output_dir", tmp_path / "run", "--max_steps", 2]
    outcome = train(2, argv, before=partial(keep_waiting, waiting, ended), meanwhile=signal_waiting)
    assert outcome.exit_codes == [128 + TERM] * 2, outcome.output
    assert outcome.output.endswith(f"SIGTERM: {NOTHING_TO_SAVE}")
    assert "Traceback" not in outcome.output


def wait_for_cpp(pid: int) -> None:
    """Wait until the main thread of a process sleeps: it then waits for the other rank."""
    deadline, asleep = time.monotonic() + 60, 0
    while asleep < 20:
        assert time.monotonic() < deadline
        asleep = asleep + 1 if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.02)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("file", "line"),
    [
        pytest.param("train.py", "model = build_model(", id="the other waits for it"),
        pytest.param("train.py", "load_weights(model", id="weights", marks=pytest.mark.slow),
        pytest.param("loss/evaluation.py", "totals[0] +=", id="the evaluation before the first step"),
    ],
)
@pytest.mark.fault(
    "process",
    "SIGTERM to one rank alone before the first step, without a launcher that ends the others",
    "all ranks end within seconds with the exit code of the signal, and say which rank had it",
)
def test_one_rank_before_the_loop(tiny: list[object], tmp_path: Path, file: str, line: str, rank: int) -> None:
    outcome = train(
        2, [*tiny, "--output_dir", tmp_path, "--max_steps", 2], before=partial(signal_rank, rank, file, line)
    )
    assert outcome.exit_codes == [128 + TERM] * 2, outcome.output
    assert "Traceback" not in outcome.output
    if rank == 1:
        host = socket.gethostname()
        assert outcome.output.endswith(f"train.py: error: rank 1 on {host}: SIGTERM: {NOTHING_TO_SAVE}")


@pytest.mark.slow
@pytest.mark.fault(
    "process",
    "SIGTERM to one rank alone while the reference of DPO is computed",
    "both ranks end with the exit code of the signal, and say which rank had it; the same command then trains",
)
def test_in_the_reference_pass(dpo: list[object], tmp_path: Path) -> None:
    argv = [*dpo, "--strategy", "fsdp", "--max_steps", 2, "--output_dir"]
    interrupted = [*argv, tmp_path / "run", "--data_cache_dir", tmp_path / "cache"]
    before = partial(signal_rank, 1, "loss/dpo_reference.py", "table[:, batch")
    outcome = train(2, interrupted, before=before)
    assert outcome.exit_codes == [128 + TERM] * 2, outcome.output
    assert "Traceback" not in outcome.output
    assert f"rank 1 on {socket.gethostname()}: SIGTERM: {NOTHING_TO_SAVE}" in outcome.output
    assert not list((tmp_path / "cache").glob("reference-*")), "half of a reference is not kept"
    train_ok(2, *interrupted)
    train_ok(2, *argv, tmp_path / "unbroken")
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "unbroken")


def signal_rank(rank: int, file: str, line: str) -> None:
    """Patch a rank: it gets SIGTERM at that line."""
    at_line(file, line, 1, rank, lambda: os.kill(os.getpid(), TERM))


def keep_waiting(waiting: Path, ended: Path) -> None:
    """Patch the ranks: rank 1 writes `waiting` as it begins to wait; rank 0 does not come before `ended` exists."""

    def hold() -> None:
        while not ended.exists():
            time.sleep(0.05)

    for rank, act in ((0, hold), (1, waiting.touch)):
        if os.environ["RANK"] == str(rank):
            at_line("train.py", "dist.init_process_group(", 1, rank, act)


def slow_evaluation(evaluation: int, batches: int, count: Path) -> None:
    """Patch both ranks: rank 1 gets SIGTERM in the second micro-batch of an evaluation, whose later ones take a second.

    `evaluation` counts from 1; each has `batches` micro-batches. Rank 0 writes a byte to `count` for each of them.
    """
    rank, seen = int(os.environ["RANK"]), 0

    def hook(module: torch.nn.Module, *_: Any) -> None:
        nonlocal seen
        if torch.is_grad_enabled():
            return
        seen += 1
        if rank == 0:
            with count.open("a") as file:
                file.write(".")
        into = seen - batches * (evaluation - 1)
        if into == 2 and rank == 1:
            os.kill(os.getpid(), TERM)
        if into >= 2:
            threading.Event().wait(1)

    start = Recorder.start

    def patched(
        self: Recorder, text: str, step: int, tokens: int, due: bool, wrapped: torch.nn.Module, *rest: Any
    ) -> None:
        wrapped.register_forward_pre_hook(hook)
        start(self, text, step, tokens, due, wrapped, *rest)

    Recorder.start = patched  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    "evaluation",
    [pytest.param(2, id="in the middle"), pytest.param(4, id="after the last step", marks=pytest.mark.slow)],
)
@pytest.mark.fault(
    "process",
    "SIGTERM to one rank in an evaluation that takes longer than the grace of a launcher or a batch system",
    "all ranks leave the evaluation and save the step; the resumed run evaluates first, and is the unbroken one",
)
def test_in_a_long_evaluation(tiny: list[object], tmp_path: Path, evaluation: int) -> None:
    run, count = tmp_path / "run", tmp_path / "count"
    argv = [*tiny, "--per_device_eval_batch_size", 1, "--max_steps", 12, "--eval_steps", 4, "--save_steps", 4]
    argv += ["--load_best_model_at_end", "--resume_from_checkpoint", "auto", "--seed", 3]
    train_ok(2, *argv, "--output_dir", tmp_path / "unbroken")
    batches = 25  # of an evaluation, on each rank
    outcome = train(2, [*argv, "--output_dir", run], before=partial(slow_evaluation, evaluation, batches, count))
    last = 4 * (evaluation - 1)
    assert outcome.exit_codes == [128 + TERM] * 2, outcome.output
    assert f"step {last}: a signal ended the evaluation; the resumed run begins with it\n" in outcome.output
    assert f"stopped by a signal after step {last}; continue with" in outcome.output
    assert count.stat().st_size - batches * (evaluation - 1) <= 4, "the evaluation went on"
    assert problems(run / f"checkpoint-{last}") == []
    assert not list(run.glob("*.safetensors"))
    for _ in range(2):  # a resumed run may be interrupted, too, and evaluate again
        train_ok(2, *argv, "--output_dir", run)
        assert trajectory(run) == trajectory(tmp_path / "unbroken")
    if last < 12:
        assert equal_to_the_bit(run / "checkpoint-12", tmp_path / "unbroken" / "checkpoint-12")
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "unbroken" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("checkpoint.export_model(", id="export"),
        pytest.param("without a last collective", id="final barrier", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(
    "process",
    "SIGTERM during the export of the finished model, or in the last barrier",
    "the model is complete, exit code 0",
)
def test_after_the_loop(tiny: list[object], tmp_path: Path, line: str) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 2]
    outcome = train(1, argv, before=partial(signal_at, "train.py", line, TERM, False))
    assert outcome.exit_codes == [0], outcome.output
    assert "Traceback" not in outcome.output
    assert (tmp_path / "model.safetensors").exists()
    assert problems(tmp_path / "checkpoint-2") == []


@pytest.mark.slow
@pytest.mark.fault(
    "process", "SIGTERM while the finished model completes `--prompt`", "the completion ends early, exit code 0"
)
def test_in_the_completion(tiny: list[object], tmp_path: Path) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--max_steps", 2, "--prompt", "the"]
    outcome = train(1, argv, before=signal_completion)
    assert outcome.exit_codes == [0], outcome.output
    assert "SIGTERM: the finished model is written, then the end" in outcome.output
    completion = outcome.output.partition("--- completion of 'the' ---\n")[2].partition("\n---")[0]
    assert 0 < len(completion) < 30, "more than one token"
    assert (tmp_path / "model.safetensors").exists()


def signal_completion() -> None:
    """Patch a rank: it gets SIGTERM before the first token of the completion, and goes on once it has noted it."""

    def act() -> None:
        os.kill(os.getpid(), TERM)
        while not stop_requested():
            time.sleep(0.01)

    at_line("model/build.py", "output_BT = model.generate(", 1, 0, act)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["--standalone", "--master_port=29611"])
@pytest.mark.fault(
    "process",
    "SIGTERM to all processes of a job in its first steps: torchrun, ranks and workers of loaders",
    "a checkpoint of this or the next step, all are gone, the same command continues exactly",
)
def test_all_processes_of_torchrun(tiny: list[object], tmp_path: Path, launcher: str) -> None:
    output = tmp_path / "run"
    argv = [*tiny, "--max_steps", 60, "--dataloader_num_workers", 2, "--resume_from_checkpoint", "auto"]
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", launcher]
    run = start([*argv, "--output_dir", output], *command)
    # A rank that still ends the evaluation before the first step has nothing to save. After a step, no rank is there.
    wait_for(lambda: any("loss" in record for record in read_records(output / "metrics.jsonl")), run)
    everyone = [run.pid, *processes_of(run)]
    for pid in everyone:  # torchrun forwards its own, so each rank gets two
        os.kill(pid, TERM)
    printed, _ = run.communicate(timeout=100)
    assert run.returncode == 1, printed  # torchrun's code after a signal
    assert "SIGTERM: a checkpoint after this step" in printed
    assert [pid for pid in everyone if Path(f"/proc/{pid}").exists()] == []
    last = steps_of(output)
    assert 0 < last < 60, printed
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{last}"]
    assert problems(output / f"checkpoint-{last}") == []
    again = start([*argv, "--output_dir", output], *command)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    train_ok(2, *argv, "--output_dir", tmp_path / "unbroken")
    same_curve(output, tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.fault(
    "process",
    "SIGUSR1 to torchrun whose --signals-to-handle lists it",
    "every rank saves the same step; torchrun ends its ranks after --shutdown-timeout",
)
def test_sigusr1_to_torchrun(tiny: list[object], tmp_path: Path) -> None:
    argv = [*tiny, "--max_steps", 100_000, "--output_dir", tmp_path, "--overwrite_output_dir"]
    flags = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--shutdown-timeout=8"]
    run = start(argv, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *flags)
    wait_for(lambda: steps_of(tmp_path) > 3, run)
    everyone = [run.pid, *processes_of(run)]
    run.send_signal(USR1)
    printed, _ = run.communicate(timeout=100)
    assert "SIGUSR1: a checkpoint after this step, then training continues" in printed
    (saved,) = tmp_path.glob("checkpoint-*")
    assert problems(saved) == []
    assert [pid for pid in everyone if Path(f"/proc/{pid}").exists()] == []
