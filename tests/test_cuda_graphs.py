"""Proves loss/cuda_graphs.py without a GPU: when micro-steps become graphs, and the order of their kinds.

tests/test_gpu.py compares whole runs on a GPU.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from config.errors import OptionError
from config.options import Options
from data.batches import Batch
from loss.cuda_graphs import WARMUP_STEPS, Replayed, obstacle, with_cuda_graphs
from loss.next_token import NextToken
from model.build import build_model
from tests.families import FAMILIES
from tests.launch import train

SUITABLE = Options(torch_compile=True)


def objective_of(config: PretrainedConfig) -> NextToken:
    """The objective of a model on the meta device."""
    return NextToken(build_model(Options(), config))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process has a GPU, and is alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


@pytest.mark.parametrize(
    ("ranks", "options", "packing", "reason"),
    [
        (1, {}, "concat", ""),
        (1, {"strategy": "fsdp"}, "concat", ""),
        (1, {"cuda_graphs": "false"}, "concat", "cuda_graphs is false"),
        (1, {"ddp_backend": "gloo"}, "concat", "gloo"),
        (1, {"torch_compile": False}, "concat", "torch_compile"),
        (1, {"trace_steps": 2}, "concat", "trace_steps"),
        (1, {}, "documents", "packing documents"),
        (1, {}, "none", "packing none"),
        (1, {"streaming": True}, "concat", "shapes"),
        (1, {"strategy": "fsdp", "cpu_offload": True}, "concat", "offloading"),
        (1, {"gradient_checkpointing": True, "offload_activations": True}, "concat", "offloading"),
        (2, {"cuda_graphs": "true"}, "concat", "DDP needs a single rank"),
        (2, {"strategy": "fsdp"}, "concat", ""),
    ],
    ids=str,
)
def test_obstacle(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch, ranks: int, options: dict[str, Any], packing: str, reason: str
) -> None:
    """Each reason alone keeps a run on the plain path; without any, it has graphs."""
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    found = obstacle(dataclasses.replace(SUITABLE, **options), packing, objective_of(FAMILIES["qwen3"][0]))
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(("name", "reason"), [("qwen3 moe", "experts"), ("gemma2", "after its head")])
def test_obstacle_of_a_model(on_gpu: None, name: str, reason: str) -> None:
    """Experts change shapes. A cap after the head needs all logits, which is another path."""
    assert reason in obstacle(SUITABLE, "concat", objective_of(FAMILIES[name][0]))


def test_dropout_is_an_obstacle(on_gpu: None) -> None:
    config = type(FAMILIES["qwen3"][0])(**{**FAMILIES["qwen3"][0].to_dict(), "attention_dropout": 0.1})
    assert "dropout" in obstacle(SUITABLE, "concat", objective_of(config))


def test_asked_for_and_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes the plain path on a CPU; true is refused with the reason and a remedy."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    objective = objective_of(FAMILIES["qwen3"][0])

    def plain(batch: Batch, scale: float) -> Tensor:
        return torch.zeros(())

    assert with_cuda_graphs(plain, objective, objective, SUITABLE, "concat", 1) is plain
    asked = dataclasses.replace(SUITABLE, cuda_graphs="true")
    with pytest.raises(OptionError, match=r"cuda_graphs true: .*there is no GPU\nremove --cuda_graphs"):
        with_cuda_graphs(plain, objective, objective, asked, "concat", 1)


def test_a_run_refuses_them_on_the_cpu(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(2, [*tiny, "--output_dir", tmp_path, "--cuda_graphs", "true"])
    assert outcome.exit_codes == [2, 2]
    assert "cuda_graphs true: not possible here, because there is no GPU\nremove --cuda_graphs" in outcome.output
    assert "Traceback" not in outcome.output


class Recording:
    """A stand-in for a CUDA graph: what it records is a copy of the tape of operations, and it plays them again."""

    def __init__(self, run: Any) -> None:
        self.replay = run


@pytest.mark.parametrize("micro_steps", [1, 2, 3, 5])
def test_kinds_of_micro_steps(monkeypatch: pytest.MonkeyPatch, micro_steps: int) -> None:
    """First, middle and last micro-step are recorded once each. Inputs, factor and gradients are those of the call."""
    wrapped = nn.Linear(2, 1, bias=False)
    recorded: list[int] = []

    def plain(batch: Batch, scale: float) -> Tensor:
        loss = wrapped(batch["x"]).sum()
        (loss * scale).backward()
        return loss.detach()

    replayed = Replayed(plain, wrapped, micro_steps)
    gradient, result = torch.zeros(1, 2), torch.zeros(())

    def record() -> tuple[Any, Tensor]:
        first = replayed.calls % micro_steps == 1 or micro_steps == 1
        recorded.append(replayed.calls)

        def run() -> None:  # what kernels do: they write memory, and know nothing of parameters
            new = replayed.inputs["x"].sum(0, keepdim=True) * replayed.scale
            gradient.copy_(new if first else gradient + new)
            result.copy_((replayed.inputs["x"] @ wrapped.weight.detach().T).sum())

        replayed.gradients = [(next(wrapped.parameters()), gradient)]
        return Recording(run), result

    monkeypatch.setattr(replayed, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, WARMUP_STEPS + 4):
        expected = torch.zeros(1, 2)
        for _ in range(micro_steps):
            values = torch.randn(3, 2, generator=generator)
            loss = replayed({"x": values}, 0.5 / step)
            assert loss.item() == pytest.approx((values @ wrapped.weight.detach().T).sum().item(), abs=1e-5)
            expected += values.sum(0, keepdim=True) * 0.5 / step
        assert wrapped.weight.grad is not None
        torch.testing.assert_close(wrapped.weight.grad, expected)
        wrapped.zero_grad()
    assert len(recorded) == min(3, micro_steps)
    assert recorded[0] == WARMUP_STEPS * micro_steps + 1


def test_another_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes cannot change where obstacle finds nothing; if they did, a graph must not read the wrong memory."""
    replayed = Replayed(lambda batch, scale: torch.zeros(()), nn.Linear(2, 1), 1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(replayed, "record", lambda: (Recording(lambda: None), torch.zeros(())))
    for _ in range(WARMUP_STEPS + 1):
        replayed({"x": torch.zeros(3, 2)}, 1.0)
    with pytest.raises(AssertionError, match="x has another shape"):
        replayed({"x": torch.zeros(4, 2)}, 1.0)
