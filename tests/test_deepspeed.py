"""Proves config/peers/deepspeed.py and deepspeed_keys.py, config/__main__.py, and schedules of optim/schedule.py.

Each key of a DeepSpeed file sets an option, is refused or is explained. A run has the loss curve of DeepSpeed itself.
"""

import importlib
import json
import os
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import DEEPSPEED_SCHEDULES, Options
from config.peers.deepspeed import without_comments
from config.peers.deepspeed_keys import DECIDING_OPTION, DIRECT, NO_EFFECT, REFUSED, UNKNOWN
from data.ledger import read
from data.prepare import prepare_data
from metrics.records import read_records
from model.build import load_config_and_tokenizer
from optim.schedule import learning_rate
from tests.launch import train, train_ok
from tests.proof import GATES, TENSOR, relative_l2

# Three files as they are published: stage 2, stage 3, and all values "auto".
STAGE_2_OFFLOADED = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-3, "warmup_num_steps": 5},
    },
    "gradient_clipping": 0.4,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "steps_per_print": 1,
    "wall_clock_breakdown": False,
}
STAGE_3_OFFLOADED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "bf16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "weight_decay": 0.01, "adam_w_mode": True}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "sub_group_size": 1e9,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True},
}
ALL_AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def options_of(directory: Path, content: Any, *argv: object, ranks: int | None = 4) -> Options:
    """The checked options of a run with a file of this content and with `argv`."""
    (directory / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["--deepspeed", str(directory / "ds.json"), "--model_name_or_path", "x", *map(str, argv)]
    options = parse(words, ranks)
    check(options, ranks or 1)
    return options


@pytest.mark.parametrize(
    ("content", "argv", "expected"),
    [
        (
            STAGE_2_OFFLOADED,
            ["--per_device_train_batch_size", 4, "--learning_rate", "0.003"],
            {
                "strategy": "fsdp",
                "reshard_after_forward": False,
                "cpu_offload": True,
                "sync_each_batch": True,
                "global_batch_size": 16,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "learning_rate": 3e-3,
                "adam_beta2": 0.95,
                "weight_decay": 0.1,
                "lr_scheduler_type": "WarmupLR",
                "warmup_steps": 5,
                "max_grad_norm": 0.4,
                "logging_steps": 10,  # steps_per_print is about messages of DeepSpeed
                "bf16": False,
            },
        ),
        (
            STAGE_3_OFFLOADED,
            ["--sync_each_batch", "false"],
            {
                "strategy": "fsdp",
                "reshard_after_forward": True,
                "cpu_offload": True,
                "sync_each_batch": False,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8,
                "global_batch_size": None,
                "learning_rate": 1e-5,
                "lr_scheduler_type": "linear",
                "gradient_checkpointing": True,
                "offload_activations": True,
                "bf16": True,
            },
        ),
        (
            ALL_AUTO,
            ["--learning_rate", 7e-4, "--gradient_accumulation_steps", 2, "--warmup_steps", 3, "--max_grad_norm", 0.5],
            {
                "strategy": "fsdp",
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "learning_rate": 7e-4,
                "warmup_steps": 3,
                "lr_scheduler_type": "WarmupDecayLR",
                "lr_scheduler_kwargs": None,
                "max_grad_norm": 0.5,
                "cpu_offload": False,
            },
        ),
        ({"zero_optimization": {"stage": 1}}, [], {"strategy": "ddp", "shard_optimizer": True}),
        ({"zero_optimization": {"stage": 0}}, [], {"strategy": "ddp", "shard_optimizer": False}),
        ({"zero_optimization": True}, [], {"strategy": "ddp", "shard_optimizer": True}),
        ({}, ["--strategy", "fsdp"], {"strategy": "fsdp", "cpu_offload": False}),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload": True}},
            [],
            {"strategy": "fsdp", "reshard_after_forward": False, "cpu_offload": True},
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, [], {"cpu_offload": False}),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, [], {"replicas": 2}),
        (
            {"train_batch_size": 16, "zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}},
            [],
            {"tensor_parallel": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        ),
        (
            {"train_batch_size": 16, "sequence_parallel_size": 4},
            [],
            {"context_parallel": 4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        ),
        ({"train_batch_size": 32}, [], {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}),
        ({"train_batch_size": 32}, [*TENSOR], {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}),
        (
            {"train_batch_size": 32, "gradient_accumulation_steps": "auto"},
            ["--per_device_train_batch_size", 2],
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ),
        (
            {"train_batch_size": 6.4e1, "gradient_accumulation_steps": 2},
            [],
            {"per_device_train_batch_size": 8, "global_batch_size": 64},
        ),
        ({"scheduler": {"type": "WarmupDecayLR"}}, [], {"learning_rate": 0.001, "warmup_steps": 1000}),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1, "warmup_num_steps": 9}}},
            ["--learning_rate", 1],
            {"learning_rate": 1.0, "warmup_steps": 9, "lr_scheduler_kwargs": '{"cos_min_ratio": 0.1}'},
        ),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, [], {"bf16": True}),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": -1}}, [], {"replicas": 1}),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, [], {"reduce_dtype": "bfloat16"}),
        ({"optimizer": {"params": {"betas": [0.8, 0.9]}}}, [], {"adam_beta1": 0.8, "adam_beta2": 0.9}),
        ({"tensorboard": {"enabled": True, "output_path": "logs"}}, [], {"report_to": "tensorboard"}),
    ],
)
def test_keys_set_options(content: Any, argv: list[object], expected: dict[str, Any], tmp_path: Path) -> None:
    options = options_of(tmp_path, content, *argv)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("content", "argv", "expected"),
    [
        (STAGE_2_OFFLOADED | {"gradient_accumulation_steps": 2}, [], "16 is not train_micro_batch_size_per_gpu 4 x "),
        (STAGE_2_OFFLOADED | {"gradient_accumulation_steps": 2}, [], "gradient_accumulation_steps 2 x 4 ranks = 32"),
        ({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4}, [], "30 = train_micro_batch_size_per_gpu 4 x "),
        (
            {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4},
            [],
            "steps 1.875 x 4 ranks: not a whole number",
        ),
        ({"train_batch_size": 16}, ["--global_batch_size", 32], "global_batch_size 32: train_batch_size 16 of "),
        (ALL_AUTO, ["--strategy", "ddp"], "strategy ddp: zero_optimization.stage 3 of "),
        (STAGE_2_OFFLOADED, ["--learning_rate", 1], "learning_rate 1.0: scheduler.params.warmup_max_lr 0.003 of "),
        (STAGE_2_OFFLOADED, ["--reshard_after_forward"], "stage 2 of "),
        (STAGE_2_OFFLOADED, ["--cpu_offload", "false"], 'offload_optimizer.device "cpu" of '),
        ({"bf16": {"enabled": False}}, ["--bf16"], "bf16 true: bf16.enabled false of "),
        ({"fp16": {"enabled": True}}, [], "fp16.enabled true: fp16 needs loss scaling"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}}},
            [],
            'offload_param.device "nvme": offload to a disk is not implemented\nwrite cpu, or train on more ranks',
        ),
        ({"zero_optimization": {"stage": 4}}, [], "pass a stage from 0 to 3"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            [],
            "weights are gathered in bf16 or fp32",
        ),
        ({"optimizer": {"type": "Lamb"}}, [], '"Lamb": a file can set AdamW only\nremove the section, or write AdamW'),
        (
            {"optimizer": {"type": "Muon"}},
            [],
            '"Muon": a file can set AdamW only\nremove the section, and pass --optim m',
        ),
        ({"optimizer": {"type": "AdamW"}}, ["--optim", "muon"], 'optim muon: optimizer.type "AdamW" of '),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}},
            [],
            "Adam would add weight_decay 0.1 to the gradient, which is not AdamW",
        ),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["--weight_decay", 1], "not AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}, [], "betas 0.9: pass two numbers"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, [], 'lr "fast": pass a number of at least 0'),
        ({"scheduler": {"type": "OneCycle"}}, [], 'scheduler.type "OneCycle": pass WarmupLR, WarmupDecayLR'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}},
            [],
            "warmup_type cubic: pass log, linear",
        ),
        (
            {"compression_training": {"weight_quantization": {"enabled": True}}},
            [],
            "it changes the model; remove the key",
        ),
        ({"elasticity": {"enabled": True}}, [], "it would choose the batch"),
        ({"train_batch_size": 1.5}, [], "train_batch_size 1.5: pass a whole number"),
        ({"communication_data_type": "bf16"}, [], "ddp reduces in fp32, fsdp (stages 2 and 3) in fp32 or bf16"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            [],
            "gradients accumulate in fp32; write fp32",
        ),
        ({"scheduler": {"type": ["WarmupLR"]}}, [], 'scheduler.type ["WarmupLR"]: pass WarmupLR, WarmupDecayLR'),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, [], "late updates change the numbers"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 3}}, [], "4 ranks are not a multiple of it"),
        (
            '{"train_batch_size": 1, // global\n "train_batch_size": 2}',
            [],
            "the key train_batch_size appears twice, in lines 1 and 2",
        ),
        ("{train_batch_size: 1}", [], "pass a JSON file as DeepSpeed reads it"),
        ("{", [], "pass a JSON file as DeepSpeed reads it"),
        ("[]", [], "it is not a JSON object"),
    ],
)
def test_refused_keys(content: Any, argv: list[object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        options_of(tmp_path, content, *argv)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_comments_as_in_hjson(tmp_path: Path) -> None:
    """DeepSpeed reads its file by hjson.load. What looks like a comment within a string stays."""
    text = """// stage 2
    {"zero_optimization": {"stage": 2, /* or
      3 */ "offload_optimizer": {"device": "cpu", "nvme_path": "/a//b#c /* d */\\""},}, # the end
      "train_batch_size": 32, // all ranks
    }"""
    options = options_of(tmp_path, text)
    assert (options.strategy, options.cpu_offload, options.per_device_train_batch_size) == ("fsdp", True, 8)
    assert without_comments(text).count("\n") == text.count("\n")
    assert json.loads(without_comments(text))["zero_optimization"]["offload_optimizer"]["nvme_path"].endswith(
        '/* d */"'
    )


def test_plain_adam_without_decay_is_adamw(tmp_path: Path) -> None:
    parameters = {"adam_w_mode": False, "weight_decay": 0, "lr": 3e-4}
    options = options_of(tmp_path, {"optimizer": {"type": "Adam", "params": parameters}})
    assert (options.learning_rate, options.weight_decay) == (3e-4, 0)


def test_preparation_of_data_needs_no_ranks(tmp_path: Path) -> None:
    """`python -m data.prepare` takes the options of the run, on a machine without its ranks."""
    (tmp_path / "ds.json").write_text('{"train_batch_size": 1000, "train_micro_batch_size_per_gpu": 3}')
    assert parse(["--deepspeed", str(tmp_path / "ds.json")]).per_device_train_batch_size == 3


def test_table_has_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m config` prints a line for each key, in the order of the file. Unknown keys are repeated at the end."""
    content = STAGE_2_OFFLOADED | {"gradient_cliping": 1.0, "wall_clock_breakdown": True, "frobnicate": {"x": 1}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    monkeypatch.setattr("sys.argv", ["", str(file), "--ranks", "4"])
    runpy.run_module("config", run_name="__main__")
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"deepspeed {file}, key by key:"
    shown = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert list(dict.fromkeys(key.split(".")[0] for key in shown)) == list(content)
    assert len(shown) == len(re.findall(r'": (?!\{)', json.dumps(content)))
    assert shown["train_batch_size"].endswith("global_batch_size 16 = micro-batch 4 x accumulation 1 x 4 ranks")
    assert shown["zero_optimization.overlap_comm"].startswith("true         no effect: communication always overlaps")
    assert shown["wall_clock_breakdown"].startswith("true         no effect: metrics.jsonl has the times of a step")
    assert lines[-2:] == [
        "unknown key gradient_cliping: not known here, without effect; did you mean gradient_clipping?",
        "unknown key frobnicate.x: not known here, without effect",
    ]

    monkeypatch.setattr("sys.argv", ["", str(file), "--ranks", "3"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("config", run_name="__main__")
    wrong = capsys.readouterr()
    assert wrong.err.startswith(f"config: error: deepspeed {file}: train_batch_size 16 is not ")
    assert not wrong.out


@pytest.mark.parametrize(
    ("content", "key", "meaning"),
    [
        ({"bf16": {"enable": True}}, "bf16.enable", "unknown; did you mean bf16.enabled?"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation.stage", "unknown; did you mean zero_optimization.st"),
        ({"moe": {"enabled": True}}, "moe.enabled", "unknown"),
        ({"optimizer": {"type": "AdamW", "params": {"foo": 1}}}, "optimizer.params.foo", "unknown"),
        ({"steps_per_print": float("inf")}, "steps_per_print", "left to logging_steps 10"),
        ({"steps_per_print": 2000}, "steps_per_print", "left to logging_steps 10"),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1e-3}}},
            "scheduler.params.warmup_max_lr",
            "no effect: the highest rate of WarmupCosineLR is that of the optimizer",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
            "scheduler.params.warmup_num_steps",
            "warmup_steps 0",
        ),
        ({"fp16": {"enabeld": True}}, "fp16.enabeld", "unknown; did you mean fp16.enabled?"),
        (
            {"tensor_parallel": {"tp_size": 2}},
            "tensor_parallel.tp_size",
            "unknown; did you mean tensor_parallel.autotp",
        ),
        ({"bf16": True}, "bf16", "unknown; it takes a mapping"),
        ({"fp16": {"enabled": False, "loss_scale": 0}}, "fp16.loss_scale", "no effect: fp16 is off"),
        ({"data_efficiency": {"seed": 1}}, "data_efficiency.seed", "no effect: off"),
        ({"zero_optimization": {}}, "zero_optimization", "no effect: empty"),
        (
            {"scheduler": {"params": {"warmup_min_lr": 1}}},
            "scheduler.params.warmup_min_lr",
            "no effect: left to lr_sch",
        ),
        (
            {"zero_optimization": {"stage": 3, "save_muon_momentum_buffer_in_memory": True}},
            "zero_optimization.save_muon_momentum_buffer_in_memory",
            "no effect: for NVMe only; the moment of --optim muon is always in memory",
        ),
        ({}, "gradient_clipping", "left to max_grad_norm 1.0"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "none"},
                }
            },
            "zero_optimization.offload_param.device",
            "cpu_offload true, because parameters and optimizer are offloaded together",
        ),
    ],
)
def test_meaning_of_a_key(
    content: Any, key: str, meaning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of a key says if it has no effect, also if its name has a typo, or if a value replaces a section."""
    options_of(tmp_path, content)
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    expected = meaning.replace("unknown", UNKNOWN)
    assert shown[key].split(maxsplit=1)[1].startswith(expected)
    assert ("did you mean" in shown[key]) == ("did you mean" in expected)


def test_tables_name_options_that_exist() -> None:
    assert {option for option, _ in DIRECT.values()} | set(
        DECIDING_OPTION.values()
    ) <= Options.__dataclass_fields__.keys()
    assert not (DIRECT.keys() | DECIDING_OPTION.keys()) & NO_EFFECT.keys()
    assert not DIRECT.keys() & REFUSED.keys()
    reasons = " ".join([*NO_EFFECT.values(), *REFUSED.values()])
    named = set(re.findall(r"--(\w+)", reasons))
    assert {"optim", "reduce_dtype", "trace_steps"} <= named <= Options.__dataclass_fields__.keys()


# Kind, warmup steps, parameters, and the learning rates of 12 steps in DeepSpeed 0.19.8, for a highest rate of 0.5.
SCHEDULES: list[tuple[Any, int, dict[str, Any], list[float]]] = [
    (
        "WarmupLR",
        4,
        {"warmup_min_lr": 0.1},
        [0.1, 0.1, 0.3, 0.416993, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
    ),
    (
        "WarmupDecayLR",
        4,
        {"warmup_min_lr": 0.1, "warmup_type": "linear", "total_num_steps": 10},
        [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.433333, 0.366667, 0.3, 0.233333, 0.166667, 0.1],
    ),
    (
        "WarmupCosineLR",
        4,
        {"warmup_min_ratio": 0.2, "cos_min_ratio": 0.1, "total_num_steps": 10},
        [0.0, 0.1, 0.3, 0.416993, 0.5, 0.469856, 0.3875, 0.275, 0.1625, 0.080144, 0.05, 0.05],
    ),
]


@pytest.mark.parametrize(("kind", "warmup", "parameters", "rates"), SCHEDULES, ids=[kind for kind, *_ in SCHEDULES])
def test_schedules(kind: Any, warmup: int, parameters: dict[str, Any], rates: list[float]) -> None:
    options = Options(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=0.5)
    options.lr_scheduler_kwargs = json.dumps(parameters)
    assert [learning_rate(step, 12, options) for step in range(1, 13)] == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("kind", DEEPSPEED_SCHEDULES)
@pytest.mark.parametrize("warmup_type", ["log", "linear"])
@pytest.mark.parametrize("total", [3, 9, 20])
def test_schedules_are_those_of_deepspeed(kind: Any, warmup_type: str, total: int) -> None:
    """The learning rates are those of DeepSpeed's classes. Runs if DeepSpeed is installed."""
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    parameters: dict[str, Any] = {"warmup_type": warmup_type, "total_num_steps": total}
    parameters |= {"warmup_min_ratio": 0.1} if kind == "WarmupCosineLR" else {"warmup_min_lr": 0.1}
    if kind == "WarmupLR":
        del parameters["total_num_steps"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    highest = {} if kind == "WarmupCosineLR" else {"warmup_max_lr": 0.5}
    schedule = getattr(schedules, kind)(optimizer, warmup_num_steps=5, **parameters, **highest)
    options = Options(lr_scheduler_type=kind, warmup_steps=5, learning_rate=0.5)
    options.lr_scheduler_kwargs = json.dumps(parameters)
    for step in range(1, 20):
        assert learning_rate(step, 30, options) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


# --- Runs -----------------------------------------------------------------------------------------------------------

STEPS, RANKS, BLOCK = 20, 2, 32


def options_without(tiny: list[object], *names: str) -> list[object]:
    """The options of tests/world.py without `names`, which the file sets."""
    pairs = list(zip(tiny[::2], tiny[1::2], strict=True))
    return [word for name, value in pairs if str(name)[2:] not in names for word in (name, value)]


BY_FILE = ("global_batch_size", "per_device_train_batch_size", "learning_rate", "weight_decay", "warmup_steps")


def test_stage_2_with_offload_runs(tiny: list[object], tmp_path: Path) -> None:
    """The file alone gives 16 = 4 x 1 x 4 ranks, and the loss curve of one process with the options of its table."""
    (tmp_path / "ds.json").write_text(json.dumps(STAGE_2_OFFLOADED))
    options = [*options_without(tiny, *BY_FILE, "max_grad_norm"), "--max_steps", 8]
    printed = train_ok(4, *options, "--deepspeed", tmp_path / "ds.json", "--output_dir", tmp_path / "file")
    assert printed.count("key by key") == printed.count("strategy fsdp, reshard_after_forward false") == 1
    assert "strategy      FSDP, not resharded after forward (ZeRO-2)" in printed
    same = ["--lr_scheduler_type", "WarmupLR", "--warmup_steps", "5", "--adam_beta2", "0.95", "--max_steps", "8"]
    train_ok(1, *tiny, *same, "--per_device_train_batch_size", 16, "--output_dir", tmp_path / "options")
    ours, theirs = (
        [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl") if "loss" in record]
        for name in ("file", "options")
    )
    assert ours == pytest.approx(theirs, abs=GATES.loss)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        pytest.param(STAGE_3_OFFLOADED, "FSDP (ZeRO-3), shards and layer inputs offloaded", marks=pytest.mark.slow),
        (ALL_AUTO, "FSDP (ZeRO-3)"),
    ],
)
def test_the_other_files_run(content: dict[str, Any], stage: str, tiny: list[object], tmp_path: Path) -> None:
    """Stage 3 with offload, and all values "auto", on four ranks: the strategy of the table, and a loss that falls."""
    (tmp_path / "ds.json").write_text(json.dumps(content).replace("1e-05", "0.01"))  # a learning rate for a tiny model
    options = options_without(tiny, *BY_FILE, "max_grad_norm", "bf16", "gradient_accumulation_steps", "logging_steps")
    options += ["--max_steps", 4, "--logging_steps", 1, "--output_dir", tmp_path / "run"]
    options += ["--learning_rate", "1e-2"] if content is ALL_AUTO else []
    printed = train_ok(4, *options, "--deepspeed", tmp_path / "ds.json")
    assert f"strategy      {stage}: " in printed
    losses = [record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def train_with_deepspeed(file: Path, model_dir: Path, steps: list[list[list[int]]], output_dir: Path) -> None:
    """Train with DeepSpeed instead of train.py, on each rank: the file, sequences and initial weights are equal.

    Writes the loss of each step, a mean over all ranks and micro-steps, and the parameters after the last.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")  # optional
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2]},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=str(file))
    micro_batch, losses = engine.train_micro_batch_size_per_gpu(), []
    for batch in steps:
        local_batch = torch.tensor(batch[rank :: dist.get_world_size()])
        total = torch.zeros(())
        for tokens_BT in torch.split(local_batch, micro_batch):
            loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() * micro_batch / local_batch.shape[0]
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        if rank == 0:
            (output_dir / "losses.json").write_text(json.dumps(losses))
            named = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            save_file(named, output_dir / "model.safetensors")
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_curve_as_deepspeed(tiny: list[object], model_dir: Path, tmp_path: Path, stage: int) -> None:
    """Both trainers have 20 losses within 1e-4, from one file, with equal sequences and weights. Needs DeepSpeed."""
    pytest.importorskip("deepspeed")
    content = STAGE_2_OFFLOADED | {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
    content["optimizer"] = json.loads(json.dumps(STAGE_2_OFFLOADED["optimizer"]))
    content["optimizer"]["params"]["torch_adam"] = True  # type: ignore[index]  # DeepSpeed would compile its own AdamW
    (tmp_path / "ds.json").write_text(json.dumps(content))
    options = [*options_without(tiny, *BY_FILE, "max_grad_norm", "packing", "block_size")]
    options += ["--packing", "concat", "--block_size", BLOCK, "--max_steps", STEPS]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    train_ok(RANKS, *options, "--deepspeed", tmp_path / "ds.json", "--output_dir", ours, "--ledger")
    parsed = parse(list(map(str, options)))
    sequences = prepare_data(parsed, load_config_and_tokenizer(parsed)[1]).train
    steps = [[sequences[number].tokens.tolist() for number, *_ in step] for step in read(ours).values()]
    theirs.mkdir()
    outcome = train(RANKS, [], before=partial(train_with_deepspeed, tmp_path / "ds.json", model_dir, steps, theirs))
    assert outcome.exit_codes == [0] * RANKS, outcome.output
    expected = json.loads((theirs / "losses.json").read_text())
    losses = [record["loss"] for record in read_records(ours / "metrics.jsonl") if "loss" in record]
    assert len(losses) == len(expected) == STEPS
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0] - 0.3
    trained, reference = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert relative_l2(trained, {name: reference[name] for name in trained}) < 1e-4
    deviation = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
    print(f"stage {stage}: losses within {deviation:.1e}")
