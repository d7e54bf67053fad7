"""The small parts, one by one: options, schedule, loss, the twins."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    TrainingArguments,
    get_scheduler,
    optimization,
)

import ddp
import fsdp
import metrics.recorder
from config.checks import check
from config.command_line import parse
from config.demo import DEMO_RECIPE
from config.errors import OptionError
from config.options import DEEPSPEED_SCHEDULES, GROUPS, RENAMED, TRANSFORMERS_SCHEDULES, Options
from config.plan import plan_run
from data.batches import IGNORE_INDEX, collate, next_tokens
from estimate.flops import flops_per_token
from estimate.stages import stage_name
from estimate.start_block import activations_line, sharded, start_line
from loss.cross_entropy import token_loss_sum
from metrics.records import read_records
from model.build import load_config_and_tokenizer
from optim.adamw import build_optimizer
from optim.schedule import learning_rate
from tests import world
from tests.launch import ROOT, train_ok


def test_twins_have_the_same_functions() -> None:
    """`ddp` and `fsdp` offer the same names with the same signatures, few enough not to be a Trainer."""
    ours, theirs = (
        {name: inspect.signature(value) for name, value in vars(twin).items() if isinstance(value, FunctionType)}
        for twin in (ddp, fsdp)
    )
    assert ours == theirs
    assert set(ours) == set(ddp.__all__) == set(fsdp.__all__)
    assert len(ours) <= 6


def test_twins_use_torch_alone() -> None:
    """No options, nothing of the other rooms: only torch, Python's own modules, and the type of the model."""
    for twin in (ddp, fsdp):
        for path in Path(inspect.getfile(twin)).parent.glob("*.py"):
            imports = [line.split()[1].split(".")[0] for line in path.read_text().splitlines() if " import " in line]
            assert set(imports) - sys.stdlib_module_names <= {"torch", "transformers", twin.__name__}, path


SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in ("linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup")),
    *((kind, {}) for kind in ("polynomial", "inverse_sqrt")),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"lr_end": 0.01, "power": 2}),
    ("inverse_sqrt", {"timescale": 7}),
    *((kind, {"min_lr": 0.05}) for kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 4}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "warmup_type": "cosine", "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 3, "num_stable_steps": 20, "num_cycles": 1}),
    ("warmup_stable_decay", {"num_decay_steps": 3, "num_stable_steps": 2, "min_lr_ratio": 0.2}),
]


@pytest.mark.parametrize(("kind", "parameters"), SCHEDULES, ids=str)
@pytest.mark.parametrize("warmup", [0, 3, 0.3])
def test_schedule_is_that_of_transformers(kind: str, parameters: dict[str, Any], warmup: float) -> None:
    """Each step of 12, of every schedule, with the warmup that TrainingArguments derives."""
    options = Options(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=0.5)  # type: ignore[arg-type]
    options.lr_scheduler_kwargs = json.dumps(parameters)
    if kind != "constant":
        check(options, world_size=1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    steps = TrainingArguments(warmup_steps=warmup).get_warmup_steps(12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that num_stable_steps is used where the number of all steps is given, too
        theirs = get_scheduler(kind, optimizer, steps, 12, parameters)
    for step in range(1, 13):
        assert learning_rate(step, 12, options) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_schedules_have_the_names_and_keys_of_transformers() -> None:
    """Of the installed version. Two are left out, because their rate depends on the loss."""
    theirs = {
        kind.value: tuple(inspect.signature(schedule).parameters)
        for kind, schedule in optimization.TYPE_TO_SCHEDULER_FUNCTION.items()
        if kind.value not in ("reduce_lr_on_plateau", "greedy")
    }
    assert theirs.keys() == TRANSFORMERS_SCHEDULES.keys()
    ours = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # set by the trainer
    for kind, keys in TRANSFORMERS_SCHEDULES.items():
        assert set(keys) == set(theirs[kind]) - set(ours), kind
    assert {*TRANSFORMERS_SCHEDULES, *DEEPSPEED_SCHEDULES} == set(
        get_args(get_type_hints(Options)["lr_scheduler_type"])
    )


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("cosine_with_min_lr", {}),
        ("cosine_warmup_with_min_lr", {}),
        ("polynomial", {}),
        ("warmup_stable_decay", {"num_decay_steps": 300}),
    ],
)
def test_min_lr_is_where_a_schedule_ends(kind: str, more: dict[str, Any]) -> None:
    argv = ["--lr_scheduler_type", kind, "--learning_rate", "0.5", "--min_lr", "0.02", "--max_steps", "1000"]
    options = parse([*argv, "--lr_scheduler_kwargs", json.dumps(more)])
    check(options, world_size=1)
    assert learning_rate(1000, 1000, options) == pytest.approx(0.02, rel=0.03)
    assert min(learning_rate(step, 1000, options) for step in range(500, 1001)) >= 0.02 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["cosine", '{"min_lr": 1e-6}'], 'lr_scheduler_kwargs {"min_lr": 1e-6}: min_lr: unknown\n--lr_scheduler_type '),
        (["linear", '{"a": 1}'], "--lr_scheduler_type linear takes none; remove --lr_scheduler_kwargs"),
        (["cosine", "num_cycles=2"], "--lr_scheduler_type cosine takes a JSON mapping of num_cycles"),
        (["cosine", "[1]"], "--lr_scheduler_type cosine takes a JSON mapping of num_cycles"),
        (["cosine", '{"num_cycles": "2"}'], "num_cycles 2: pass a number from 0"),
        (["cosine", '{"num_cycles": true}'], "num_cycles True: pass a number from 0"),
        (["cosine_with_min_lr", "{}"], "cosine_with_min_lr: it needs one lowest learning rate\npass --min_lr"),
        (["cosine_with_min_lr", '{"min_lr": 0, "min_lr_rate": 0}'], "it needs one lowest learning rate"),
        (
            ["cosine_with_min_lr", '{"min_lr": 1}'],
            "learning_rate 0.006: --lr_scheduler_type cosine_with_min_lr ends at",
        ),
        (["cosine_with_min_lr", '{"min_lr_rate": 2}'], "min_lr_rate 2: pass a fraction of learning_rate"),
        (["cosine_with_min_lr", '{"min_lr_rate": 0}', "--min_lr", "0"], "min_lr_rate of lr_scheduler_kwargs sets it"),
        (["cosine_with_min_lr", "{}", "--min_lr", "1"], "min_lr 1: pass 0 to learning_rate, 0.006"),
        (["cosine_with_min_lr", "{}", "--min_lr", "nan"], "min_lr nan: pass 0 to learning_rate"),
        (["cosine", "{}", "--min_lr", "1e-4"], "pass --lr_scheduler_type cosine_with_min_lr, or remove --min_lr"),
        (["linear", "{}", "--min_lr", "1e-4"], "pass --lr_scheduler_type polynomial, or remove --min_lr"),
        (["WarmupLR", "{}", "--min_lr", "1e-4"], "pass --lr_scheduler_type one of cosine_with_min_lr, "),
        (
            ["polynomial", "{}", "--learning_rate", "1e-8"],
            "learning_rate 1e-08: --lr_scheduler_type polynomial ends at",
        ),
        (["inverse_sqrt", '{"timescale": 0}'], "timescale 0: pass a number of steps above 0"),
        (["warmup_stable_decay", '{"decay_type": "sqrt"}'], "decay_type sqrt: pass linear, cosine, 1-sqrt"),
        (["warmup_stable_decay", '{"num_decay_steps": 0.1}'], "num_decay_steps 0.1: pass a whole number of steps"),
        (["warmup_stable_decay", "{}"], """as in --lr_scheduler_kwargs '{"num_decay_steps": 200}'"""),
        (
            ["warmup_stable_decay", '{"num_decay_steps": 2000}'],
            "warmup 100 + decay 2000 steps are more than the 2000 of",
        ),
        (
            ["warmup_stable_decay", '{"num_decay_steps": 100, "num_stable_steps": 100}'],
            "warmup 100 + decay 100 + stable 100 steps leave 1700 of 2000 with a learning rate of 0\nremove num_stable",
        ),
    ],
    ids=str,
)
def test_schedules_that_are_refused(argv: list[str], expected: str) -> None:
    def start() -> None:
        options = parse(["--lr_scheduler_type", argv[0], "--lr_scheduler_kwargs", *argv[1:]])
        check(options, world_size=1)
        plan_run(options, sequences=100, world_size=1)

    with pytest.raises(OptionError) as error:
        start()
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_decay_is_for_matrices_alone(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    decayed, others = build_optimizer(model, Options(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_loss_is_that_of_transformers(model_dir: Path) -> None:
    """Sum over targets / number of targets = the mean that transformers computes on the same labels."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = collate([world.row(torch.randint(0, 384, (length,))) for length in (7, 12, 2)])
    theirs = model(input_ids=batch["input_ids"], labels=batch["labels"])
    ours = token_loss_sum(theirs.logits, batch["labels"]) / batch["targets"]
    assert ours.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    assert int(batch["targets"]) == 6 + 11 + 1


def test_labels_are_the_next_tokens() -> None:
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORE_INDEX]]


def test_mean_of_means_would_be_another_gradient(model_dir: Path) -> None:
    """What the trainer must not do differs by more than 1e-2, so that the topology test would see it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    micro_batches = [collate([world.row(torch.randint(0, 384, (length,)))]) for length in (64, 3)]

    def gradient(mean_of_means: bool) -> torch.Tensor:
        model.zero_grad()
        targets = sum(int(batch["targets"]) for batch in micro_batches)
        for batch in micro_batches:
            loss = token_loss_sum(model(input_ids=batch["input_ids"]).logits, batch["labels"])
            part: Any = loss / int(batch["targets"]) / 2 if mean_of_means else loss / targets
            part.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    right, wrong = gradient(False), gradient(True)
    assert float((wrong - right).norm() / right.norm()) > 1e-2


def test_a_batch_without_targets_is_finite() -> None:
    batch = collate([world.row(torch.tensor([3]))])
    loss = token_loss_sum(torch.randn(1, 2, 8, requires_grad=True), batch["labels"])
    assert loss.item() == 0.0


def test_flops() -> None:
    """Against the count by hand: 6 per multiplied weight, 6 x layers x query width x length for causal attention."""
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 32, "head_dim": 4}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, num_attention_heads=2, num_key_value_heads=1))
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 32
    assert flops_per_token(model, 10) == 6 * weights + 6 * 3 * 8 * 10


def test_run_file(tmp_path: Path) -> None:
    """run.json and run.yaml are the same options; the command line wins over them, they over the recipe."""
    values = {"learning_rate": 1e-4, "strategy": "fsdp", "bf16": True, "train_file": None, "max_steps": 7}
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-4\nstrategy: fsdp\nbf16: true\ntrain_file: null\nmax_steps: 7"
    )
    for name in ("run.json", "run.yaml"):
        options = parse([str(tmp_path / name), "--max_steps", "9"])
        assert (options.learning_rate, options.strategy, options.bf16, options.max_steps) == (1e-4, "fsdp", True, 9)
        assert options.train_file is None
        assert options.block_size == DEMO_RECIPE["block_size"]
    assert parse(["--model_name_or_path", "x"]).learning_rate == 5e-5, "the recipe is for no model at all"


def test_constant_has_no_warmup() -> None:
    """A warmup that the user gives with `constant` is refused; the warmup of the demo recipe is not."""
    constant = ["--lr_scheduler_type", "constant"]
    options = parse(constant)
    check(options, world_size=1)
    assert (options.lr_scheduler_type, options.warmup_steps) == ("constant", 0)
    check(parse([*constant, "--warmup_steps", "0"]), world_size=1)
    message = (
        "warmup_steps 3: --lr_scheduler_type constant has no warmup\npass --lr_scheduler_type constant_with_warmup"
    )
    for model in ([], ["--model_name_or_path", "x"]):
        with pytest.raises(OptionError, match=message):
            check(parse([*constant, *model, "--warmup_steps", "3"]), world_size=1)
    check(parse(["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "3"]), world_size=1)


def test_a_resume_says_if_its_schedule_does_not_continue(tmp_path: Path) -> None:
    """More steps of warmup_stable_decay continue a run before its decay; after the decay, the rate would rise."""
    argv = ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 20}']
    argv += ["--learning_rate", "0.5", "--warmup_steps", "10", "--max_steps"]
    first, longer = parse([*argv, "100"]), parse([*argv, "200"])
    plan = plan_run(longer, sequences=1000, world_size=1)
    assert start_line(longer, plan, None) == "from the beginning"
    for step, more in (
        (80, ""),
        (95, f"; step 95 had the learning rate {learning_rate(95, 100, first):g}, and has 0.5"),
    ):
        progress = {"step": step, "learning_rate": learning_rate(step, 100, first)}
        (tmp_path / "state.json").write_text(json.dumps({"progress": progress, "options": {}}))
        assert start_line(longer, plan, tmp_path) == f"resumed from {tmp_path}{more}{' in this schedule' * bool(more)}"
    (tmp_path / "state.json").write_text(json.dumps({"progress": {"step": 95}, "options": {}}))  # of an older version
    assert start_line(longer, plan, tmp_path) == f"resumed from {tmp_path}"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--logging_first_step", "--no_eval_on_start"], [(1, "loss"), (3, "loss"), (4, "loss"), (4, "eval_loss")]),
        pytest.param([], [(0, "eval_loss"), (3, "loss"), (4, "loss"), (4, "eval_loss")], marks=pytest.mark.slow),
        pytest.param(["--num_train_epochs", 0, "--no_eval_on_start"], [(0, "eval_loss")], marks=pytest.mark.slow),
    ],
)
def test_the_first_records(more: list[object], expected: list[object], tiny: list[object], tmp_path: Path) -> None:
    """--logging_first_step adds step 1, --eval_on_start false takes step 0 away, and evaluation alone stays."""
    steps = -1 if "--num_train_epochs" in more else 4
    train_ok(1, *tiny, "--output_dir", tmp_path, "--max_steps", steps, "--logging_steps", 3, *more)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [
        (record["step"], name) for record in records for name in ("loss", "eval_loss") if name in record
    ] == expected


def test_epochs_win_over_the_recipe() -> None:
    """--num_train_epochs works in the demo, too, although its recipe sets max_steps."""
    assert parse(["--num_train_epochs", "1"]).max_steps == -1
    assert parse([]).max_steps == DEMO_RECIPE["max_steps"]


def test_help_lists_each_option_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option stands once, under its group, with its help and the default of `Options()`; the whole is short."""
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 145
    introduction, *groups, last = re.split(r"\n\n", shown.strip())[1:]
    assert "Brackets show the default" in introduction
    assert "the demo model is trained, with defaults of its own" in last
    assert [group.partition(":\n")[0] for group in groups[1:]] == list(GROUPS)
    listed = [name for group in groups[1:] for name in re.findall(r"^  --(\w+)", group, re.MULTILINE)]
    assert listed == [field.name for field in dataclasses.fields(Options)], "a group holds neighbors"
    for group in groups[1:]:
        for entry in re.split(r"\n(?=  --)", group.partition("\n")[2]):
            field = Options.__dataclass_fields__[entry.split()[0][2:]]
            assert group.startswith(field.metadata["group"])
            default = getattr(Options(), field.name)
            default = str(default).lower() if isinstance(default, bool) else default
            words = field.metadata["help"] + ("" if default is None else f" [{default}]")
            assert len(field.metadata["help"]) > 10
            assert " ".join(entry.split()).endswith(" ".join(words.split())), field.name
    assert set(DEMO_RECIPE) <= Options.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--bf16=No"], "bf16", False),
        (["--no_async_save"], "async_save", False),
        (["--no-async-save"], "async_save", False),
        (["--disable_tqdm"], "disable_tqdm", True),
        (["--disable_tqdm", "false"], "disable_tqdm", False),
        ([], "disable_tqdm", None),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--packing=none"], "packing", "none"),
        (["--prompt", "--a b-c"], "prompt", "--a b-c"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
    ids=str,
)
def test_forms_of_an_option(argv: list[str], name: str, value: object) -> None:
    assert getattr(parse([*argv]), name) == value


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_of_an_option(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accepted on the command line and in a run file; rank 0 says the new name; both names together are an error."""
    (tmp_path / "run.yaml").write_text(f"{old}: 0.5")
    for argv in ([f"--{old}", "0.5"], [f"--{old.replace('_', '-')}=0.5"], [str(tmp_path / "run.yaml")]):
        assert getattr(parse(argv), new) == 0.5
        assert capsys.readouterr().err == f"{old}: this option is now called {new}\n"
    with pytest.raises(OptionError, match=f"^{old} 0.5: cannot be combined with {new}, its new name\nremove --{old}$"):
        parse([str(tmp_path / "run.yaml"), f"--{new}", "0.2"])
    assert not hasattr(Options, old)
    monkeypatch.setenv("RANK", "1")
    parse([f"--{old}", "0.5"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "DDP: each rank holds parameters, moments and gradients"),
        (
            ["--shard_optimizer"],
            "DDP, optimizer sharded (ZeRO-1): moments sharded over 4 ranks; each rank holds parameters and gradients",
        ),
        (
            ["--strategy", "fsdp", "--reshard_after_forward", "false"],
            "FSDP, not resharded after forward (ZeRO-2): parameters, gradients and moments sharded over 4 ranks, "
            "full parameters until gradients are reduce-scattered",
        ),
        (["--strategy", "fsdp"], "FSDP (ZeRO-3): parameters, gradients and moments sharded over 4 ranks"),
        (
            ["--strategy", "fsdp", "--gradient_accumulation_steps", "2", "--cpu_offload"],
            "FSDP (ZeRO-3), shards offloaded: parameters, gradients and moments sharded over 4 ranks, full "
            "gradients between micro-steps, shards and optimizer in host memory",
        ),
        (
            ["--strategy", "fsdp", "--tensor_parallel", "2"],
            "tensor parallel 2 x FSDP (ZeRO-3): parameters, gradients and moments sharded over 4 ranks, each layer "
            "split among 2 ranks",
        ),
        (
            ["--context_parallel", "2"],
            "context parallel 2 x DDP: each rank holds parameters, moments and gradients, each sequence split "
            "among 2 ranks",
        ),
        (
            ["--strategy", "fsdp", "--context_parallel", "4", "--cpu_offload"],
            "context parallel 4 x FSDP (ZeRO-3), shards offloaded: parameters, gradients and moments sharded over "
            "4 ranks, each sequence split among 4 ranks, shards and optimizer in host memory",
        ),
        (
            ["--strategy", "fsdp", "--gradient_accumulation_steps", "2", "--sync_each_batch"],
            "FSDP (ZeRO-3): parameters, gradients and moments sharded over 4 ranks",
        ),
        (
            ["--strategy", "fsdp", "--replicas", "2"],
            "hybrid FSDP, 2 replicas: parameters, gradients and moments sharded over 2 ranks",
        ),
    ],
)
def test_stage_of_the_start_block(argv: list[str], expected: str) -> None:
    options = parse(argv)
    assert f"{stage_name(options)}: {sharded(options, ranks=4)}" == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "saved for the backward pass"),
        (["--gradient_checkpointing"], "only the input of each layer is saved; the rest is recomputed"),
        (
            ["--gradient_checkpointing", "--offload_activations"],
            "only the input of each layer is saved, in host memory; the rest is recomputed",
        ),
        (["--activation_memory_budget", "0.25"], "25% of each layer's are saved; the rest is recomputed"),
    ],
)
def test_activations_of_the_start_block(argv: list[str], expected: str) -> None:
    assert activations_line(parse(argv)) == expected


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_global_batch_gives_the_accumulation(world_size: int, accumulation: int) -> None:
    options = Options(global_batch_size=16, per_device_train_batch_size=2, block_size=8, num_train_epochs=1.5)
    check(options, world_size)
    plan = plan_run(options, sequences=100, world_size=world_size)
    assert (plan.accumulation, plan.global_batch_size) == (accumulation, 16)
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 9)


@pytest.mark.parametrize(("kind", "world_size", "factor"), [("sqrt", 4, 2), ("linear", 4, 4), ("linear", 1, 1)])
def test_the_learning_rate_follows_the_batch(kind: str, world_size: int, factor: float) -> None:
    argv = ["--learning_rate", "1e-3", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
    options = parse([*argv, "--scale_learning_rate", kind, "--reference_batch_size", "16"])
    check(options, world_size)
    assert options.learning_rate == pytest.approx(factor * 1e-3)
    unscaled = parse(argv)
    check(unscaled, world_size)
    assert unscaled.learning_rate == 1e-3


def test_config_without_tokenizer_gets_the_embedded_one(model_dir: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(model_dir, vocab_size=5000).save_pretrained(tmp_path / "shape")
    options = Options(config_name=str(tmp_path / "shape"), data_cache_dir=str(tmp_path / "cache"))
    _, tokenizer = load_config_and_tokenizer(options)
    assert len(tokenizer) == 4096
    assert options.block_size == 256
    options.tokenizer_name = str(model_dir)
    _, tokenizer = load_config_and_tokenizer(options)
    assert len(tokenizer) == 384


def test_rows_beyond_a_cut_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("terminal", "options", "bar"),
    [
        pytest.param(False, [], False, marks=pytest.mark.slow),
        pytest.param(False, ["--disable_tqdm", "false"], True, marks=pytest.mark.slow),
        (True, [], True),
        pytest.param(True, ["--disable_tqdm"], False, marks=pytest.mark.slow),
    ],
)
def test_progress(tiny: list[object], tmp_path: Path, terminal: bool, options: list[str], bar: bool) -> None:
    """A terminal shows a bar; a log gets a line every logging_steps, without a redraw; --disable_tqdm decides both."""
    settings = [*tiny, "--max_steps", 4, "--logging_steps", 2, "--output_dir", tmp_path / "run", *options]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, settings)]
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 120))  # a new one has no columns, and tqdm draws nothing
    with open(tmp_path / "output", "w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=writer)
    os.close(writer)
    errors = b""
    with contextlib.suppress(OSError):  # a pseudo terminal ends with EIO
        while block := os.read(reader, 4096):
            errors += block
    os.close(reader)
    assert run.wait() == 0, errors.decode()
    text = (tmp_path / "output").read_text()
    assert "\r" not in text
    assert (b"step/s" in errors or b"s/step" in errors) == bar
    assert bar or b"\r" not in errors.replace(b"\r\n", b"\n")  # a terminal ends a line with both
    line = r"^step (\d)/4: loss [\d.]+, lr [\d.e+-]+, [\d,]+ tokens/s, \d+:\d\d:\d\d left$"
    assert re.findall(line, text, re.MULTILINE) == ([] if bar else ["2", "4"])


def test_schema_of_metrics(tiny: list[object], tmp_path: Path) -> None:
    """metrics.jsonl has the fields that the docstring of metrics.py defines, no more and no fewer."""
    train_ok(1, *tiny, "--output_dir", tmp_path, "--max_steps", 2, "--logging_steps", 2)
    evaluation, training, _ = read_records(tmp_path / "metrics.jsonl")
    assert training.keys() == {
        "step",
        "epoch",
        "tokens_seen",
        "loss",
        "grad_norm",
        "learning_rate",
        "skipped_steps",
        "tokens_per_second",
        "mfu",
        "peak_memory_gib",
        "data_wait_seconds",
        "save_seconds",
    }
    assert metrics.recorder.__doc__
    assert all(f"    {name}" in metrics.recorder.__doc__ for name in training)
    assert training["tokens_per_second"] > 0
    names = {"eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_tokens"}
    assert evaluation.keys() == {"step", "epoch", "tokens_seen", *names}
    assert all(f"    {name}" in metrics.recorder.__doc__ for name in names)
    assert evaluation["eval_perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]))
