"""Proves optim/muon.py and optim/adamw.py: torch's arithmetic, equal curves and checkpoints on any topology.

A resume on the same ranks, to the bit, is in test_resume.py, a skipped step in test_numerics.py, bytes in
test_memory.py.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    DbrxConfig,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MambaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)

from compare.convergence import evaluations, first_at
from config.demo import DEMO_MODEL
from config.options import Options
from metrics.records import read_records
from model.layers import Stack, decoder_matrices
from optim.adamw import build_optimizer
from optim.muon import COEFFICIENTS, Muon, orthogonalize
from tests.families import FAMILIES, make_family
from tests.launch import train, train_ok
from tests.proof import GATES, relative_l2
from tests.test_errors import refused
from tests.test_resume import equal_to_the_bit, save_again

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2}
MIXTURE: dict[str, Any] = {**SIZES, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 16}
DBRX_FFN = {"ffn_hidden_size": 16, "moe_num_experts": 3, "hidden_size": 32, "ffn_act_fn": {"name": "silu"}}
DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
DBRX = DbrxConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64, attn_config=DBRX_ATTENTION, ffn_config=DBRX_FFN)

# How a family stores its experts: the matrices of one, by the parameter's name, written by hand from its forward.
STORED: dict[str, tuple[PretrainedConfig, dict[str, Callable[[Tensor], list[Tensor]]]]] = {
    "rows, gate and up one after the other": (
        FAMILIES["qwen3 moe"][0],
        {"gate_up_proj": lambda expert: [expert[:16], expert[16:]], "down_proj": lambda expert: [expert]},
    ),
    "columns, gate and up interleaved": (
        GptOssConfig(**MIXTURE, num_local_experts=3, num_experts_per_tok=2),
        {"gate_up_proj": lambda expert: [expert[:, 0::2], expert[:, 1::2]], "down_proj": lambda expert: [expert]},
    ),
    "columns, no attribute says so": (
        Llama4TextConfig(**MIXTURE, intermediate_size_mlp=48, num_local_experts=3),
        {"gate_up_proj": lambda expert: [expert[:, :16], expert[:, 16:]], "down_proj": lambda expert: [expert]},
    ),
    "columns, a module for each": (
        AriaTextConfig(**MIXTURE, moe_num_experts=3, moe_topk=2),
        {"fc1.weight": lambda expert: [expert[:, :16], expert[:, 16:]], "fc2.weight": lambda expert: [expert]},
    ),
    "experts of attention": (
        JetMoeConfig(**SIZES, kv_channels=8, intermediate_size=16, num_local_experts=3),
        {
            "mlp.input_linear.weight": lambda expert: [expert[:16], expert[16:]],
            "mlp.output_linear.weight": lambda expert: [expert],
            "experts.input_linear.weight": lambda expert: [expert],
            "experts.output_linear.weight": lambda expert: [expert],
        },
    ),
    "two dimensions": (DBRX, dict.fromkeys(("w1", "v1", "w2"), lambda expert: [expert])),
}

ON = ["--optim", "muon", "--global_batch_size", 12, "--lr_scheduler_type", "constant_with_warmup"]


@pytest.fixture(scope="module")
def one_process(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("one")
    micro_batch = ["--per_device_train_batch_size", 12, "--save_steps", 10]
    output = train_ok(1, *tiny, *ON, *micro_batch, "--output_dir", output_dir)
    assert "Muon for 18,432 parameters in matrices of the decoder layers, AdamW for all others" in output
    rows = read_records(output_dir / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.3, "it must learn"
    return output_dir


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (2, []),
        pytest.param(3, ["--shard_optimizer"], marks=pytest.mark.slow),
        (2, ["--strategy", "fsdp"]),
        # Three ranks cannot divide the rows of anything.
        pytest.param(3, ["--strategy", "fsdp"], marks=pytest.mark.slow),
        pytest.param(4, ["--strategy", "fsdp", "--replicas", "2"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_curve(one_process: Path, tiny: list[object], tmp_path: Path, ranks: int, extra: list[str]) -> None:
    train_ok(ranks, *tiny, *ON, "--output_dir", tmp_path, "--per_device_train_batch_size", 1, *extra)
    rows, references = (read_records(path / "metrics.jsonl") for path in (tmp_path, one_process))
    for row, reference in zip(rows, references, strict=True):
        for key in {"loss", "eval_loss"} & reference.keys():
            assert row[key] == pytest.approx(reference[key], abs=GATES.loss)
    expected = load_file(one_process / "model.safetensors")
    assert relative_l2(load_file(tmp_path / "model.safetensors"), expected) < GATES.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values(dtype: torch.dtype) -> None:
    """Singular values end between 0.6 and 1.3 for wide, tall and square matrices; singular vectors do not change."""
    torch.manual_seed(0)
    for rows, columns in ((24, 80), (80, 24), (32, 32)):
        matrix_RC = torch.randn(rows, columns) @ torch.diag(torch.linspace(0.1, 1, columns))
        left, values, right = torch.linalg.svd(matrix_RC, full_matrices=False)
        near = left.T @ orthogonalize(matrix_RC.to(dtype), Stack((rows, columns))).float() @ right.T
        kept = values > 0.02 * values.max()  # what is smaller takes more than five steps
        assert ((near.diag()[kept] > 0.6) & (near.diag()[kept] < 1.3)).all()
        assert (near - torch.diag(near.diag())).abs().max() < 0.05


def test_gradients_are_divided() -> None:
    """Gradients are divided by `grad_scale` before the momentum. The scale is a power of 2, so equal to the bit."""
    torch.manual_seed(0)
    plain, scaled = (Qwen3ForCausalLM(Qwen3Config(**DEMO_MODEL, vocab_size=64)) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    optimizers = [build_optimizer(model, Options(optim="muon", learning_rate=1e-2)) for model in (plain, scaled)]
    optimizers[1].grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    for _ in range(2):
        for parameter, other in zip(plain.parameters(), scaled.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = 4 * parameter.grad
        for optimizer in optimizers:
            optimizer.step()
    for parameter, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_as_torch_does() -> None:
    """Five steps of all matrices against torch.optim.Muon, in bf16, and of the rest against AdamW, to the bit."""
    torch.manual_seed(0)
    ours, theirs = (Qwen3ForCausalLM(Qwen3Config(**DEMO_MODEL, vocab_size=64)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = Options(optim="muon", bf16=True, learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(ours, options)
    assert isinstance(optimizer, Muon)
    matrices = decoder_matrices(theirs)
    assert len(matrices) == 2 * 7
    muon = torch.optim.Muon(list(matrices.values()), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(theirs, Options(learning_rate=1e-2, weight_decay=0.1))
    for _ in range(5):
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        optimizer.step()
        muon.step()  # type: ignore[no-untyped-call]
        for parameter in matrices.values():
            parameter.grad = None  # so that AdamW leaves it as it is
        adamw.step()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6 if name in matrices else 0)


def newton_schulz(matrix_RC: Tensor) -> Tensor:
    """The five steps of the blog post that optim/muon.py names, for one matrix."""
    a, b, c = COEFFICIENTS
    wide = matrix_RC.T if matrix_RC.shape[0] > matrix_RC.shape[1] else matrix_RC
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix_RC.shape[0] > matrix_RC.shape[1] else wide


def by_hand(stored: str, name: str, values: Tensor) -> list[Tensor]:
    """The matrices of a parameter, or of its gradient, as views."""
    config, split = STORED[stored]
    halves = next((split[suffix] for suffix in split if name.endswith(suffix)), None)
    if halves is None:
        return [values]
    return [matrix for expert in (values.view(3, 16, 32) if config is DBRX else values) for matrix in halves(expert)]


@pytest.mark.parametrize("stored", STORED)
def test_each_expert_alone(stored: str) -> None:
    """Two steps of a model's experts, and of its other matrices, against one matrix after the other."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(STORED[stored][0])
    optimizer = build_optimizer(model, Options(optim="muon", learning_rate=1e-2, weight_decay=0.1))
    updated = decoder_matrices(model)
    alone = {
        name: [(matrix.detach().clone(), torch.zeros_like(matrix)) for matrix in by_hand(stored, name, parameter)]
        for name, parameter in updated.items()
    }
    of_experts = [name for name in updated if len(alone[name]) > 1]
    assert len(of_experts) == len(STORED[stored][1]) * STORED[stored][0].num_hidden_layers
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for name, parameter in updated.items():
            assert parameter.grad is not None
            for (values, momentum), gradient in zip(alone[name], by_hand(stored, name, parameter.grad), strict=True):
                momentum.lerp_(gradient, 0.05)
                direction = newton_schulz(gradient.lerp(momentum, 0.95))
                values.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * 0.2 * max(values.shape) ** 0.5 * direction)
        optimizer.step()
    for name, parameter in updated.items():
        for matrix, (values, _) in zip(by_hand(stored, name, parameter), alone[name], strict=True):
            torch.testing.assert_close(matrix, values, rtol=0, atol=1e-6)


def test_what_is_no_matrix() -> None:
    """AdamW gets convolutions, elementwise factors and biases of experts, whatever their dimensions."""
    hybrid = Qwen3NextConfig(
        **MIXTURE,
        layer_types=["linear_attention"],
        num_experts=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    for config, others in (
        (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64), {"mixer.A_log", "mixer.conv1d.weight"}),
        (hybrid, {"linear_attn.conv1d.weight"}),
        (STORED["columns, gate and up interleaved"][0], {"experts.gate_up_proj_bias", "experts.down_proj_bias"}),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        updated = decoder_matrices(model)
        layers = {name for name, parameter in model.named_parameters() if ".0." in name and parameter.dim() >= 2}
        assert {name.split(".0.")[1].removeprefix("mlp.") for name in layers - set(updated)} == others


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (2, ["--strategy", "fsdp"]),
        pytest.param(2, ["--shard_optimizer"], marks=pytest.mark.slow),
        pytest.param(4, ["--strategy", "fsdp"], marks=pytest.mark.slow),  # three experts: the last rank has none
        pytest.param(4, ["--strategy", "fsdp", "--replicas", "2"], marks=pytest.mark.slow),
        pytest.param(3, [], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_on_any_ranks(mixture: Path, tiny: list[object], tmp_path: Path, ranks: int, extra: list[str]) -> None:
    """A run on one rank that others resume: the state to the bit, then an equal curve; rank 1 has one of 3 experts."""
    shutil.copytree(mixture / "checkpoint-3", tmp_path / "checkpoint-3")
    options = [*tiny, *ON, "--model_name_or_path", mixture.parent / "qwen3 moe", "--max_steps", 8, *extra]
    options += ["--per_device_train_batch_size", 1, "--resume_from_checkpoint", "auto", "--output_dir", tmp_path]
    outcome = train(ranks, options, before=partial(save_again, tmp_path / "again"))
    assert outcome.exit_codes == [0] * ranks, outcome.output
    assert equal_to_the_bit(tmp_path / "again" / "checkpoint-3", mixture / "checkpoint-3")
    expected = load_file(mixture / "model.safetensors")
    assert relative_l2(load_file(tmp_path / "model.safetensors"), expected) < GATES.parameters


@pytest.fixture(scope="module")
def mixture(tiny: list[object], model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, a mixture with three experts, eight steps."""
    directory = tmp_path_factory.mktemp("mixture")
    model = make_family("qwen3 moe", directory, model_dir)
    options = [*tiny, *ON, "--model_name_or_path", model, "--max_steps", 8, "--save_steps", 3]
    train_ok(1, *options, "--per_device_train_batch_size", 12, "--output_dir", directory / "one")
    return directory / "one"


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(3, ["--strategy", "fsdp"]), pytest.param(2, ["--shard_optimizer"], marks=pytest.mark.slow)],
    ids=str,
)
def test_resumed_elsewhere(one_process: Path, tiny: list[object], tmp_path: Path, ranks: int, extra: list[str]) -> None:
    """Loaded state equals saved state to the bit; later steps differ by rounding."""
    shutil.copytree(one_process / "checkpoint-10", tmp_path / "checkpoint-10")
    options = [*tiny, *ON, "--per_device_train_batch_size", 1, "--resume_from_checkpoint", "auto", *extra]
    outcome = train(ranks, [*options, "--output_dir", tmp_path], before=partial(save_again, tmp_path / "again"))
    assert outcome.exit_codes == [0] * ranks, outcome.output
    assert equal_to_the_bit(tmp_path / "again" / "checkpoint-10", one_process / "checkpoint-10")
    expected = load_file(one_process / "model.safetensors")
    assert relative_l2(load_file(tmp_path / "model.safetensors"), expected) < GATES.parameters


def test_time_to_a_loss() -> None:
    """Two steps of 100 tokens at 50 and at 25 tokens/s; the target loss is reached after 1.5 steps."""
    rows = [{"step": 0, "eval_loss": 8.0}]
    for step, speed in ((1, 50.0), (2, 25.0)):
        rows.append({"step": step, "loss": 9.0, "tokens_seen": 100 * step, "tokens_per_second": speed})
        rows.append({"step": step, "eval_loss": 8.0 - 2 * step})
    curve = evaluations(rows)
    assert curve == [(0, 0.0, 8.0), (1, 2.0, 6.0), (2, 6.0, 4.0)]
    assert first_at(5.0, curve) == (1.5, 4.0)
    assert first_at(3.0, curve) is None


def test_another_optimizer_is_refused(one_process: Path, tiny: list[object], tmp_path: Path) -> None:
    """Another optimizer cannot resume, because its moments differ."""
    resume = ["--resume_from_checkpoint", one_process / "checkpoint-10", "--output_dir", tmp_path]
    message = refused(*tiny, *ON, *resume, "--optim", "adamw_torch_fused")
    assert "optim was muon and is adamw_torch_fused now\npass --optim muon; see docs/troubleshooting.md" in message
