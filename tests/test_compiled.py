"""Proves model/compile.py on the CPU: compiled layers have the eager curve, and few graphs are compiled."""

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import flop_counter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3Config,
)

import ddp
import model.compile
from config.checks import check
from config.errors import OptionError
from config.options import Options
from loss.next_token import NextToken
from metrics.records import read_records
from model.build import build_model
from model.compile import Shape, _attention_flops, compile_layers, set_recomputation
from model.layers import random_noise
from tests.families import FAMILIES
from tests.launch import train, train_ok
from tests.proof import FSDP, GATES, TENSOR, relative_l2

BUDGET = ["--activation_memory_budget", "0.3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "of_the_compiler"),
    [
        (["--gradient_checkpointing"], []),
        ([*FSDP, "--gradient_checkpointing"], []),
        (FSDP, BUDGET),
        (["--packing", "documents", *FSDP, "--gradient_checkpointing"], []),
        (TENSOR, []),
        ([*TENSOR, "--gradient_checkpointing"], []),
        ([*TENSOR, "--reshard_after_forward", "false"], []),
    ],
    ids=str,
)
def test_same_curve(tiny: list[object], tmp_path: Path, extra: list[str], of_the_compiler: list[str]) -> None:
    options = [*tiny, *extra, "--max_steps", 5]
    train_ok(2, *options, "--output_dir", tmp_path / "plain")
    train_ok(2, *options, "--output_dir", tmp_path / "compiled", "--torch_compile", "true", *of_the_compiler)
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain"))
    for row, expected in zip(ours, theirs, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], abs=1e-5)


@pytest.mark.slow
def test_lengths_are_compiled_twice(model_dir: Path) -> None:
    """One graph for the first length and one for any, shared by all layers; likewise in evaluation."""
    torch.compiler.reset()
    counters.clear()
    objective = NextToken(AutoModelForCausalLM.from_pretrained(model_dir).train(), compiled=True)
    for length in (20, 33, 47, 64, 21, 50, 39, 28):
        tokens_BT = torch.randint(0, 384, (4, length))
        objective(tokens_BT, tokens_BT).backward()
    assert counters["stats"]["unique_graphs"] <= 2 * 2  # of a layer, and of the loss


@pytest.mark.parametrize(("packing", "symbols"), [("concat", [False] * 3), ("none", [False, True])])
def test_shapes_of_concat_are_static(
    packing: str, symbols: list[bool], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training has the same kernels, whether the last batch of an evaluation came before it or not (after a resume).

    All layers share the graphs.
    """
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=record))
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    compile_layers(model, Options(), packing)
    for sequences in (8, 3, 4, 8, 4):
        model(torch.zeros(sequences, 16, dtype=torch.int64), use_cache=False)
    assert graphs == symbols


@pytest.mark.slow
def test_kinds_and_lengths_and_evaluation_are_compiled() -> None:
    """Two kinds of layers, sequences within and beyond a window, and evaluation exceed torch's default limit."""
    torch.compiler.reset()
    gemma = copy.deepcopy(FAMILIES["gemma3"][0])
    gemma.layer_types = ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(gemma, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = NextToken(model)
    compile_layers(model, Options(gradient_checkpointing=True), "none")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in (64, 33, 47, 12, 10):
            tokens_BT = torch.randint(0, 384, (4, length))
            objective.eval()
            with torch.no_grad():
                objective(tokens_BT, tokens_BT)
            objective.train()
            objective(tokens_BT, tokens_BT).backward()


def many_small_buckets() -> None:
    """Make DDP's buckets end within each layer, and print how many graphs were compiled."""
    wrap, leave = ddp.wrap, os._exit

    def wrap_with_small_buckets(*args: Any) -> Any:
        wrapped: Any = wrap(*args)
        wrapped.bucket_bytes_cap = dist._DEFAULT_FIRST_BUCKET_BYTES = 1
        return wrapped

    def say_and_leave(exit_code: int) -> None:
        print(f"graphs: {counters['aot_autograd']['total']}\n", end="", flush=True)  # in one piece: two ranks do so
        leave(exit_code)

    ddp.wrap = wrap_with_small_buckets  # type: ignore[assignment]
    os._exit = say_and_leave  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "of_the_loss"), [([], 1), (TENSOR, 2)], ids=str)
def test_a_layer_is_one_graph(tiny: list[object], tmp_path: Path, extra: list[str], of_the_loss: int) -> None:
    """One graph per layer under DDP too, shared by all layers, with and without tensor parallelism. Tensors between
    subgraphs would be saved for the backward pass."""
    options = [*tiny, *extra, "--torch_compile", "true", "--max_steps", 1, "--validation_split_percentage", 0]
    options += ["--packing", "concat"]  # one length
    outcome = train(2, [*options, "--output_dir", tmp_path], before=many_small_buckets)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert re.findall(r"graphs: (\d+)", outcome.output) == [f"{1 + of_the_loss}"] * 2


@pytest.fixture
def budget_as_it_was() -> Iterator[None]:
    """Restores the compiler's settings of the process after the test."""
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("budget_as_it_was")
def test_memory_budget(model_dir: Path) -> None:
    """Fewer activations are saved for the backward pass, and the gradient does not change."""
    tokens_BT = torch.randint(0, 384, (4, 64))
    kept: dict[float | None, int] = {}
    gradients = {}
    for budget in (None, 0.5, 0.0):
        torch.compiler.reset()
        model = AutoModelForCausalLM.from_pretrained(model_dir).train()
        objective = NextToken(model)
        compile_layers(model, Options(activation_memory_budget=budget), "none")
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective(tokens_BT, tokens_BT)
        loss.backward()
        kept[budget] = sum(saved.values())
        gradients[budget] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert kept[None] > kept[0.5] > kept[0.0]
    assert relative_l2(gradients[0.5], gradients[None]) < GATES.gradient
    assert relative_l2(gradients[0.0], gradients[None]) < GATES.gradient


@pytest.mark.slow
def test_second_forward_drops_the_same_places(model_with_dropout: Path) -> None:
    tokens_BT = torch.randint(0, 384, (4, 64))
    gradients = []
    for checkpointed in (False, True):
        torch.compiler.reset()
        model = AutoModelForCausalLM.from_pretrained(model_with_dropout).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        objective = NextToken(model)
        compile_layers(model, Options(gradient_checkpointing=checkpointed), "none")
        torch.manual_seed(1)
        loss = objective(tokens_BT, tokens_BT)
        torch.manual_seed(2)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert relative_l2(*gradients) < GATES.gradient


def test_no_memory_budget_with_dropout(model_with_dropout: Path) -> None:
    """Recomputation with a budget draws another dropout mask in torch 2.11 and 2.13, so the gradient would be wrong."""
    expected = r"activation_memory_budget 0\.5: the model has attention_dropout 0\.2 in its Qwen3Attention, and "
    expected += "recomputation would draw other random numbers"
    with pytest.raises(OptionError, match=expected):
        build_model(Options(activation_memory_budget=0.5), AutoConfig.from_pretrained(model_with_dropout))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Qwen3Config(), ""),
        (GPT2Config(attn_pdrop=0, resid_pdrop=0), ""),  # that of its summary belongs to another head
        (GPTNeoXConfig(), ""),  # and so does that of its classifier
        (GPT2Config(attn_pdrop=0), "p 0.1 in its Dropout"),
        (MixtralConfig(router_jitter_noise=0.01), "jitter_noise 0.01"),
        (PhimoeConfig(), "jitter"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else str(value),
)
def test_what_is_drawn_at_random(config: PretrainedConfig, expected: str) -> None:
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = random_noise(model)
    assert expected in found
    assert bool(found) == bool(expected)


@pytest.mark.usefixtures("budget_as_it_was")
def test_attention_of_grouped_queries_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries are counted, which torch 2.11 refuses; the budget needs the count."""

    def count(query: Shape, key: Shape, value: Shape) -> int:
        assert query[1] == key[1] == value[1]
        return original(query, key, value)

    original = _attention_flops
    monkeypatch.setattr(model.compile, "_attention_flops", count)
    set_recomputation(0.5)
    query_BHTE, key_BKTE = (2, 4, 8, 16), (2, 2, 8, 16)
    two_products = 2 * (2 * 4 * 8 * 8 * 16) * 2
    count_of_torch: Callable[..., int] = flop_counter.sdpa_flop_count
    assert count_of_torch(query_BHTE, key_BKTE, key_BKTE) == two_products


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The run trains without compilation and prints that once."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    options = Options(torch_compile=True)
    check(options, world_size=1)
    assert not options.torch_compile
    assert capsys.readouterr().err.startswith("torch_compile: off, because a C compiler is not here")
