"""Proves model/float8.py: which products are in float8, their error relative to bf16, and what is refused."""

import collections
import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from config.errors import OptionError
from config.options import Options
from loss.next_token import NextToken
from metrics.records import read_records
from model.build import build_model
from model.compile import compile_layers
from model.float8 import E4M3, E5M2, compute_in_float8, product, to_float8
from tests.launch import train_ok
from tests.proof import FSDP, read_tensors, relative_l2

# Relative L2 of the layers' gradient around bf16's. Three bits of mantissa are 0.026 for each factor, two are 0.05.
GRADIENT_BAND = 0.12


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products by operator, and those in float8 by the formats of the factors."""

    counts: collections.Counter[str]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "_scaled_mm":
            self.counts[f"{args[0].dtype} x {args[1].dtype}"] += 1
        elif name in ("mm", "addmm", "addmm_"):
            self.counts["others"] += 1
        return function(*args, **(kwargs or {}))


def gradient(
    model_dir: Path, length: int, float8: bool, compiled: bool = False
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The gradient of the layers in bf16 or float8, from 4 sequences of `length` tokens, and the products it used."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    names = list(model.state_dict())
    if float8:
        compute_in_float8(model)
    objective = NextToken(model)
    assert objective.ends_with_head
    if compiled:
        compile_layers(model, Options(), "none")
    tokens_BT = torch.randint(0, 384, (4, length))
    mode = Products()  # type: ignore[no-untyped-call]
    mode.counts = collections.Counter()
    with contextlib.nullcontext() if compiled else mode:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(tokens_BT, tokens_BT)
        loss.backward()
    assert list(model.state_dict()) == names
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "layers" in name}
    return gradients, dict(mode.counts)


@pytest.mark.parametrize("length", [64, 50])  # 200 tokens are not a multiple of 16
def test_gradient(model_dir: Path, length: int) -> None:
    """All products of the layers are in float8: two layers x seven modules, one forward and two backward."""
    expected, all_in_bf16 = gradient(model_dir, length, float8=False)
    ours, counts = gradient(model_dir, length, float8=True)
    assert 2e-2 < relative_l2(ours, expected) < GRADIENT_BAND
    assert counts == {f"{E4M3} x {E4M3}": 14, f"{E5M2} x {E4M3}": 28, "others": all_in_bf16["others"] - 42}


@pytest.mark.slow
def test_compiled(model_dir: Path) -> None:
    """One graph per layer, near the eager result, which rounds to bf16 more often between products."""
    counters.clear()
    ours, _ = gradient(model_dir, 50, float8=True, compiled=True)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert relative_l2(ours, gradient(model_dir, 50, float8=True)[0]) < GRADIENT_BAND
    assert 2e-2 < relative_l2(ours, gradient(model_dir, 50, float8=False)[0]) < GRADIENT_BAND


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_saves_no_product(model_dir: Path, compiled: bool) -> None:
    """With checkpointing, a layer in float8 saves what it saves in bf16: nothing but what it was called with."""
    assert saved_bytes(model_dir, True, compiled) == saved_bytes(model_dir, False, compiled) > 0


def saved_bytes(model_dir: Path, float8: bool, compiled: bool) -> int:
    """The bytes besides parameters that the forward pass of checkpointed layers keeps for the backward pass."""
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if float8:
        compute_in_float8(model)
    if compiled:
        compile_layers(model, Options(), "none")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens_BT = torch.randint(0, 384, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = model.get_input_embeddings()(tokens_BT).requires_grad_()
        saved.clear()  # the tokens
        model.model(inputs_embeds=hidden_BTD, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in parameters)


@pytest.mark.parametrize(
    "extra", [pytest.param((), marks=pytest.mark.slow), (*FSDP, "--gradient_checkpointing")], ids=str
)
def test_curve(tiny: list[object], tmp_path: Path, extra: tuple[str, ...]) -> None:
    """The losses of 20 steps stay near bf16. Saved parameters are fp32 with unchanged names."""
    options = [*tiny, *extra, "--bf16", "true", "--per_device_train_batch_size", 8]
    train_ok(2, *options, "--output_dir", tmp_path / "bf16")
    output = train_ok(2, *options, "--float8", "--output_dir", tmp_path / "float8")
    assert "compute bfloat16, matrix products of the layers float8" in output
    rows, references = (read_records(tmp_path / name / "metrics.jsonl") for name in ("float8", "bf16"))
    for row, reference in zip(rows, references, strict=True):
        for key in {"loss", "eval_loss"} & reference.keys():
            assert row[key] == pytest.approx(reference[key], abs=3e-2)
    assert rows[-1] != references[-1]
    ours, theirs = (read_tensors(tmp_path / name / "checkpoint-20" / "model") for name in ("float8", "bf16"))
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    """A product with a non-finite factor is NaN, so the step is skipped. A product with zeros is zero."""
    left, right = torch.ones(16, 32), torch.ones(32, 16)
    zeros, zeros_scale = to_float8(left * 0, dtype)
    left[3, 7] = value
    (left8, left_scale), (right8, right_scale) = to_float8(left, dtype), to_float8(right, E4M3)
    assert product(left8, right8, left_scale, right_scale, torch.float32).isnan().all()
    assert not product(zeros, right8, zeros_scale, right_scale, torch.float32).any()


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses shapes, models and GPUs that do not support float8."""
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    narrow = Qwen3Config(**shape, num_key_value_heads=2, intermediate_size=40)
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    options = Options(bf16=True, float8=True)
    with pytest.raises(
        OptionError, match=r"float8 true: mlp.gate_proj is 32 x 40, not multiples of 16\nremove --float8"
    ):
        build_model(options, narrow)
    with pytest.raises(OptionError, match=r"float8 true: the layers of GPT2LMHeadModel have no torch.nn.Linear"):
        build_model(options, gpt2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(OptionError, match=r"float8 true: A100 has no float8 matrix products\nremove --float8"):
        build_model(options, narrow)
