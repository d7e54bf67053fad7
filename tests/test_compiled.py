"""Compiled layers: the same curve, and not compiled again and again. On the CPU, where it takes a minute or two."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import config
import ddp
import metrics
from config import Options
from model.objective import NextToken
from tests.launch import train, train_ok


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [["--gradient_checkpointing"], ["--strategy", "fsdp"], ["--packing", "documents", "--strategy", "fsdp"]],
    ids=str,
)
def test_same_curve(tiny: list[object], tmp_path: Path, extra: list[str]) -> None:
    options = [*tiny, *extra, "--max_steps", 5]
    train_ok(2, *options, "--output_dir", tmp_path / "plain")
    train_ok(2, *options, "--output_dir", tmp_path / "compiled", "--torch_compile", "true")
    ours, theirs = (metrics.read_rows(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain"))
    for row, expected in zip(ours, theirs, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], abs=1e-5)


@pytest.mark.slow
def test_lengths_are_compiled_twice(model_dir: Path) -> None:
    """Once for the first length and once for any; all layers share both, and so do evaluations of their own."""
    torch.compiler.reset()
    counters.clear()
    objective = NextToken(AutoModelForCausalLM.from_pretrained(model_dir).train(), compiled=True)
    for length in (20, 33, 47, 64, 21, 50, 39, 28):
        tokens_BT = torch.randint(0, 384, (4, length))
        objective(tokens_BT, tokens_BT).backward()
    assert counters["stats"]["unique_graphs"] <= 2 * 2  # of a layer, and of the loss


def many_small_buckets() -> None:
    """Let DDP's buckets end within each layer, and say in the end how many graphs were compiled."""
    wrap, leave = ddp.wrap, os._exit

    def wrap_with_small_buckets(*args: Any) -> Any:
        wrapped: Any = wrap(*args)
        wrapped.bucket_bytes_cap = 1
        return wrapped

    def say_and_leave(exit_code: int) -> None:
        print("graphs:", counters["aot_autograd"]["total"], flush=True)
        leave(exit_code)

    ddp.wrap = wrap_with_small_buckets  # type: ignore[assignment]
    os._exit = say_and_leave  # type: ignore[assignment]


@pytest.mark.slow
def test_buckets_do_not_cut_layers(tiny: list[object], tmp_path: Path) -> None:
    """Under DDP, too, a layer is one graph: what passes between pieces of it would be kept for the backward."""
    options = [*tiny, "--torch_compile", "true", "--max_steps", 1, "--validation_split_percentage", 0]
    options += ["--packing", "concat"]  # one length
    outcome = train(2, [*options, "--output_dir", tmp_path], before=many_small_buckets)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert re.findall(r"graphs: (\d+)", outcome.output) == ["2", "2"]  # a layer, and the loss


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains nevertheless, and says so once."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    options = Options(torch_compile=True)
    config.check(options, world_size=1)
    assert not options.torch_compile
    assert capsys.readouterr().err.startswith("torch_compile: off, because a C compiler is not here")
