"""Proves checkpoint/best.py and pruning: the best checkpoint is kept and exported, and training stops early."""

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from checkpoint.best import Selection, load_best_model
from checkpoint.files import prune
from checkpoint.identity import Best, Progress
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.plan import plan_run
from data.prepare import prepare_data
from metrics.records import read_records
from tests.launch import train_ok
from tests.proof import read_tensors, relative_l2


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_transformers(threshold: float, seed: int, tmp_path: Path) -> None:
    """Random evaluations, each saved: the same best step, and the same count of those without improvement."""
    arguments = TrainingArguments(str(tmp_path), metric_for_best_model="loss", greater_is_better=False)
    callback, state = EarlyStoppingCallback(3, threshold), TrainerState()
    options = Options(load_best_model_at_end=True, early_stopping_patience=3, early_stopping_threshold=threshold)
    selection, draw = Selection(options, Progress()), random.Random(seed)
    for step in range(1, 30):
        loss = draw.choice([1.0, 2.0, draw.random(), 1.0 + draw.random()])
        control = TrainerControl()
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:  # as Trainer._determine_best_metric
            state.best_metric, state.best_global_step = loss, step
        selection.evaluated(step, {"eval_loss": loss})
        best = selection.saved(step)
        assert (best.step, best.value, best.lowest) == (state.best_global_step, state.best_metric, state.best_metric)
        assert best.without_improvement == callback.early_stopping_patience_counter
        assert selection.over == control.should_training_stop


def test_only_a_saved_evaluation_can_be_the_best() -> None:
    """A lower loss at a step without a checkpoint counts for the patience, and NaN is never an improvement."""
    selection = Selection(Options(early_stopping_patience=2, metric_for_best_model="perplexity"), Progress())
    selection.evaluated(1, {"eval_perplexity": math.nan})
    assert selection.saved(1) == Best("eval_perplexity", without_improvement=1)
    selection.evaluated(2, {"eval_perplexity": 3.0})
    selection.evaluated(3, {"eval_perplexity": 4.0})
    assert selection.saved(3) == Best("eval_perplexity", 3, 4.0, lowest=3.0, without_improvement=1)
    assert selection.saved(4).step == 3, "a checkpoint that was not evaluated"
    selection.evaluated(5, {"eval_perplexity": 3.5})
    assert selection.over
    assert selection.reason() == "stopped early: 2 evaluations in a row had no lower eval_perplexity than 3.0000"


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("best", [0, 10, 30, 40])
def test_pruning_is_that_of_transformers(limit: int | None, best: int, tmp_path: Path) -> None:
    """The newest and the best stay; so do the newest of the others, up to the limit."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        for step in (5, 10, 20, 30, 40):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
    prune(ours, limit, best)
    rotate_checkpoints(str(theirs), limit, str(theirs / f"checkpoint-{best}") if best else None)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (ours, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--metric_for_best_model", "accuracy"],
            "metric_for_best_model eval_accuracy: no evaluation has it\npass one of",
        ),
        (
            ["--train_file", "a", "--validation_file", "code=b", "--load_best_model_at_end"],
            "metric_for_best_model eval_loss: no evaluation has it\npass one of eval_code_loss, eval_code_perplexity, ",
        ),
        (["--objective", "dpo", "--metric_for_best_model", "perplexity"], "pass one of eval_loss"),
        (["--early_stopping_patience", "0"], "early_stopping_patience 0: must be at least 1"),
        (["--early_stopping_threshold", "-1"], "early_stopping_threshold -1.0: must be at least 0"),
        (["--early_stopping_patience", "3", "--eval_steps", "0"], "none during training\npass --eval_steps"),
        (
            ["--load_best_model_at_end", "--eval_steps", "30"],
            "each checkpoint must be evaluated, but save_steps 1000 is no multiple of eval_steps 30\npass --eval_steps",
        ),
        (["--load_best_model_at_end", "--save_steps", "0"], "but save_steps 0 is no multiple of eval_steps 1000"),
        (["--load_best_model_at_end", "--eval_steps", "0"], "is no multiple of eval_steps 0"),
    ],
    ids=str,
)
def test_choices_that_are_refused(argv: list[str], expected: str) -> None:
    def start() -> None:
        options = parse(argv)
        check(options, world_size=1)
        plan_run(options, sequences=100, world_size=1)

    with pytest.raises(OptionError) as error:
        start()
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def steps_of(run: Path) -> tuple[int, ...]:
    """The steps of its checkpoints, in order."""
    return tuple(sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")))


@pytest.fixture(scope="module")
def options(tiny: list[object], documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A run that overfits: it trains on some texts, and is evaluated on others, spelled backwards."""
    folder = tmp_path_factory.mktemp("overfit")
    for name, texts in {"train": documents[:30], "other": [text[::-1] for text in documents[30:40]]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = ["--train_file", folder / "train.jsonl", "--validation_file", folder / "other.jsonl"]
    steps = ["--max_steps", 40, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 99]
    rates = ["--learning_rate", 0.03, "--lr_scheduler_type", "constant_with_warmup"]
    return [*tiny, *files, *steps, *rates, "--load_best_model_at_end", "--early_stopping_patience", 2]


def check_stopped(run: Path, output: str) -> tuple[int, int]:
    """The best and the last step of a run that stopped early, after checks that it exported the best model."""
    records = [record for record in read_records(run / "metrics.jsonl") if "eval_loss" in record]
    best, last = min(records[1:], key=lambda record: record["eval_loss"]), records[-1]["step"]
    loss = f"eval_loss {best['eval_loss']:.4f}"
    assert last == best["step"] + 4, "two evaluations after the best"
    assert last < 40
    assert f"stopped early: 2 evaluations in a row had no lower {loss.replace(' ', ' than ')}\n" in output
    assert f": the model of checkpoint-{best['step']}, the best with {loss}, the tokenizer" in output
    exported = load_file(run / "model.safetensors")
    saved = read_tensors(run / f"checkpoint-{best['step']}" / "model")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    return best["step"], last


@pytest.fixture(scope="module")
def stopped(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A run on two DDP ranks that stopped early, its best step and its last one."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    return run, *check_stopped(run, train_ok(2, *options, "--output_dir", run))


def cut_off_at(step: int, run: Path, copy: Path) -> None:
    """Make `copy` what is left of `run` when it is killed after the checkpoint of `step` was saved."""
    shutil.copytree(run, copy)
    for path in copy.iterdir():
        number = int(path.name.removeprefix("checkpoint-")) if path.name.startswith("checkpoint-") else 0
        if number > step or path.name == "model.safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_finished_run_exports_the_best_model_again(
    options: list[object], stopped: tuple[Path, int, int], tmp_path: Path
) -> None:
    """As after a kill before the export: nothing is trained, and FSDP ranks load the best model of DDP ranks."""
    unbroken, best, last = stopped
    run = tmp_path / "run"
    cut_off_at(last, unbroken, run)
    options = [*options, "--output_dir", run, "--resume_from_checkpoint", "auto", "--strategy", "fsdp"]
    output = train_ok(2, *options, "--save_total_limit", 3)
    assert check_stopped(run, output) == (best, last)
    assert (run / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert steps_of(run) == (best, last - 2, last)


def test_resumed_run_remembers_the_best(options: list[object], stopped: tuple[Path, int, int], tmp_path: Path) -> None:
    """Killed between the best evaluation and the end, and resumed with FSDP: it stops at the same step."""
    unbroken, best, last = stopped
    run = tmp_path / "run"
    cut_off_at(last - 2, unbroken, run)
    options = [*options, "--output_dir", run, "--resume_from_checkpoint", "auto", "--strategy", "fsdp"]
    assert check_stopped(run, train_ok(2, *options, "--save_total_limit", 1)) == (best, last)
    assert steps_of(run) == (best, last), "with a limit of 1, the best and the newest"
    ours, theirs = (json.loads((path / f"checkpoint-{last}" / "state.json").read_text()) for path in (run, unbroken))
    for name in ("step", "value", "lowest", "without_improvement"):
        assert ours["progress"]["best"][name] == pytest.approx(theirs["progress"]["best"][name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["2 fsdp", "4 ddp --shard_optimizer", "4 fsdp --tensor_parallel 2", "1 ddp"])
def test_any_topology_stops_at_the_same_step(
    options: list[object], stopped: tuple[Path, int, int], tmp_path: Path, topology: str
) -> None:
    unbroken, *steps = stopped
    ranks, *strategy = topology.split()
    output = train_ok(int(ranks), *options, "--output_dir", tmp_path, "--strategy", *strategy)
    assert check_stopped(tmp_path, output) == tuple(steps)
    weights = [load_file(path / "model.safetensors") for path in (tmp_path, unbroken)]
    assert relative_l2(*weights) < 1e-3


def test_the_last_model_may_be_the_best(options: list[object], tmp_path: Path) -> None:
    output = train_ok(1, *options, "--output_dir", tmp_path, "--max_steps", 4)
    assert ": the model of checkpoint-4, the best with eval_loss " in output
    saved = read_tensors(tmp_path / "checkpoint-4" / "model")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_a_lost_or_damaged_best_checkpoint(alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing at a resume: a warning, and the last model. Damaged at the end: refused, with what to do."""
    options = Options(output_dir=str(tmp_path), load_best_model_at_end=True)
    progress = Progress(step=8, best=Best("eval_loss", 4, 1.0, 1.0, 3))
    missing = Selection(options, progress).best
    assert missing == Best("eval_loss", 0, None, 1.0, 3)
    assert capsys.readouterr().err.startswith(
        f"warning: {tmp_path}/checkpoint-4: the best checkpoint so far is missing"
    )
    model = nn.Linear(1, 1)
    assert load_best_model(options, model, missing) == "the model of the last step, because no checkpoint has eval_loss"
    assert load_best_model(dataclasses.replace(options, use_peft=True), model, missing).startswith("the adapters of ")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "manifest.json").write_text('{"state.json": {}}')
    best = Selection(options, progress).best
    assert best == progress.best
    with pytest.raises(OptionError, match=r"the best checkpoint is damaged: .*state.json is missing\nto export"):
        load_best_model(options, model, best)


def test_another_metric_begins_anew(alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run with another metric forgets the values of the old one, and says so."""
    progress = Progress(step=8, best=Best("eval_loss", 4, 1.0, 1.0, 3))
    options = Options(output_dir=str(tmp_path))
    assert Selection(options, progress).best == Best()
    assert not capsys.readouterr().err
    options.metric_for_best_model, options.early_stopping_patience = "perplexity", 1
    selection = Selection(options, progress)
    assert selection.best == Best("eval_perplexity")
    assert not selection.over
    assert capsys.readouterr().err == (
        "warning: eval_perplexity: the evaluations before step 8 were not compared by it\n"
    )


def test_nothing_to_compare(tiny: list[object], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without validation data there is no best model: refused before anything is trained."""
    options = [*tiny, "--output_dir", tmp_path, "--validation_split_percentage", 0, "--eval_steps", 2]
    message = "early_stopping_patience: there is no validation data, so nothing is evaluated\npass --validation_file"
    with pytest.raises(OptionError, match=message):
        prepare_data(parse([*map(str, options), "--early_stopping_patience", "2"]), tokenizer)
    assert "none, so eval_steps 2 has no effect\n" in train_ok(1, *options, "--max_steps", 1)
