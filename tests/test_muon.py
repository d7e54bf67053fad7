"""Proves optim/muon.py and optim/adamw.py: torch's arithmetic, equal curves and checkpoints on any topology.

A resume on the same ranks, to the bit, is in test_resume.py, a skipped step in test_numerics.py, bytes in
test_memory.py.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from compare.convergence import evaluations, first_at
from config.demo import DEMO_MODEL
from config.options import Options
from metrics.records import read_records
from model.layers import decoder_matrices
from optim.adamw import build_optimizer
from optim.muon import Muon, orthogonalize
from tests.launch import train, train_ok
from tests.proof import GATES, relative_l2
from tests.test_errors import refused
from tests.test_resume import equal_to_the_bit, save_again

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
        (3, ["--shard_optimizer"]),
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
        near = left.T @ orthogonalize(matrix_RC.to(dtype)).float() @ right.T
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


@pytest.mark.parametrize(("ranks", "extra"), [(3, ["--strategy", "fsdp"]), (2, ["--shard_optimizer"])], ids=str)
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
    assert message.endswith("optim was muon and is adamw_torch_fused now\npass --optim muon\n")
