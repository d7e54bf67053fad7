"""Proves optim/bf16_adamw.py: the mean of the rounded moments is exact, replicas are equal, and any ranks resume.

A resume on the same ranks, to the bit, is in test_resume.py, a skipped step in test_numerics.py, bytes in
test_memory.py.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ddp
import fsdp
import optim.bf16_adamw
from metrics.records import read_records
from optim.bf16_adamw import Bf16AdamW, mix, round_stochastically
from tests.launch import train, train_ok
from tests.proof import read_tensors, relative_l2
from tests.test_errors import refused
from tests.test_resume import cut_off_at, equal_to_the_bit, save_again

BF16_MOMENTS = ["--optim_state_dtype", "bfloat16"]
BATCH = ["--global_batch_size", 12, "--per_device_train_batch_size", 2]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}


def optimizers(values: list[Tensor], seed: int = 42, compiled: bool = False) -> tuple[Bf16AdamW, torch.optim.AdamW]:
    """One optimizer with bf16 moments, and torch's, for parameters of equal values."""
    groups = [
        [
            {
                "params": [(str(place), nn.Parameter(each.clone())) for place, each in enumerate(values)],
                "weight_decay": 0.1,
            }
        ]
        for _ in range(2)
    ]
    return Bf16AdamW(groups[0], seed, compiled, **SETTINGS), torch.optim.AdamW(groups[1], **SETTINGS)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters, moments and step counts."""
    parameters = parameters_of(optimizer)
    return [*parameters, *(tensor for each in parameters for tensor in optimizer.state[each].values())]


def take_step(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def test_rounding() -> None:
    """A number becomes one of its two neighbors. The mean is exact, what bf16 can hold stays, so does inf and NaN."""
    torch.manual_seed(0)
    values = torch.cat([torch.randn(2000), torch.randn(2000) * 1e-30, torch.tensor([3e38, -3e38, 1.0, 0.0, -0.0])])
    bits = mix(torch.arange(500 * len(values), dtype=torch.int32)).view(500, -1) & 0xFFFF
    rounded = round_stochastically(values.expand(500, -1), bits).double()
    lower = (values.view(torch.int32) & -0x10000).view(torch.float32).double()
    upper = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    assert ((rounded == lower) | (rounded == upper)).all()
    assert torch.equal(rounded[0, -3:], values[-3:].double())
    error = ((rounded - values.double()) / (upper - lower)).mean()  # in units of the last bit, over 2,000,000 numbers
    assert abs(error) < 3 * 0.5 / rounded.numel() ** 0.5
    nearest = (values.bfloat16().double() - values.double()) / (upper - lower)
    assert (rounded - values.double()).mean(dim=0).div(upper - lower)[:-3].std() < nearest[:-3].std() / 5
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    for bits in (torch.zeros(3, dtype=torch.int32), torch.full((3,), 0xFFFF, dtype=torch.int32)):
        torch.testing.assert_close(round_stochastically(special, bits), special.bfloat16(), equal_nan=True)


def test_the_bits_are_even() -> None:
    """For consecutive positions, each of the 32 bits is set half of the time, whatever the others are."""
    hashed = mix(torch.arange(2**18, dtype=torch.int32) - 2**17)
    assert len(set(hashed.tolist())) == len(hashed)
    bits = torch.stack([(hashed >> place & 1).double() for place in range(32)])
    assert ((bits.mean(dim=1) - 0.5).abs() < 0.005).all()
    assert (torch.corrcoef(bits) - torch.eye(32)).abs().max() < 0.02


@pytest.mark.parametrize("nearest", [False, True])
def test_the_second_moment_moves(nearest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients double. Stochastic rounding follows the moment in fp32; rounding to the nearest number freezes it."""
    if nearest:
        monkeypatch.setattr(optim.bf16_adamw, "round_stochastically", lambda values, bits: values.bfloat16())
    ours, theirs = optimizers([torch.zeros(4000)])
    for optimizer in (ours, theirs):
        take_step(optimizer, [torch.ones(4000)])
    moments = [optimizer.state[parameters_of(optimizer)[0]]["exp_avg_sq"].fill_(1) for optimizer in (ours, theirs)]
    for _ in range(500):
        for optimizer in (ours, theirs):
            take_step(optimizer, [torch.full((4000,), 2.0)])
    mean, expected = (float(moment.double().mean()) for moment in moments)
    assert expected == pytest.approx(4 - 3 * 0.999**500, rel=1e-3)
    if nearest:
        assert mean < 1.01
    else:
        assert mean == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_as_torch_does(compiled: bool) -> None:
    """Fused AdamW of torch: the first step to rounding, then near. Gradients are divided by `grad_scale`."""
    torch.manual_seed(0)
    values = [torch.randn(40, 30), torch.randn(7), torch.randn(3, 8, 5), torch.randn(1)]
    ours, theirs = optimizers(values, compiled=compiled)
    ours.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    before = torch.get_rng_state()
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(each.shape, generator=generator) for each in values]
        take_step(ours, [4 * gradient for gradient in gradients])
        take_step(theirs, gradients)
        if step == 0:
            for parameter, other in zip(parameters_of(ours), parameters_of(theirs), strict=True):
                torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
    assert torch.equal(before, torch.get_rng_state()), "dropout would draw other numbers"
    for parameter, other, start in zip(parameters_of(ours), parameters_of(theirs), values, strict=True):
        assert 1e-5 < float(((parameter - other).norm() / (other - start).norm()).detach()) < 0.05
        assert [tensor.dtype for tensor in ours.state[parameter].values()] == [torch.bfloat16] * 2 + [torch.float32]


@pytest.mark.slow
def test_compiled_as_eager() -> None:
    """One graph serves all sizes, and gives what eager operations give, to rounding in fp32."""
    torch.manual_seed(0)
    values = [torch.randn(40, 30), torch.randn(7), torch.randn(64, 64)]
    compiled, eager = (optimizers(values, compiled=each)[0] for each in (True, False))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            gradients = [torch.randn_like(each) for each in values]
            for optimizer in (compiled, eager):
                take_step(optimizer, gradients)
    for ours, theirs in zip(state_of(compiled), state_of(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", [42, 43])
def test_slices_and_seeds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is updated in slices has the bits of one that is not. Another seed has others."""
    torch.manual_seed(0)
    values = [torch.randn(40, 30), torch.randn(70)]
    whole = optimizers(values)[0]
    monkeypatch.setattr(optim.bf16_adamw, "SLICE", 64)
    sliced = optimizers(values, seed)[0]
    for _ in range(3):
        gradients = [torch.randn_like(each) for each in values]
        for optimizer in (whole, sliced):
            take_step(optimizer, gradients)
    equal = [torch.equal(ours, theirs) for ours, theirs in zip(state_of(whole), state_of(sliced), strict=True)]
    assert all(equal) if seed == 42 else equal.count(False) >= 6


@pytest.mark.parametrize("first", [True, False])
def test_found_inf_changes_nothing(first: bool) -> None:
    """Neither parameters nor moments nor step counts, to the bit, in the first step or later."""
    torch.manual_seed(0)
    ours = optimizers([torch.randn(40, 30)])[0]
    if not first:
        take_step(ours, [torch.randn(40, 30)])
    values = [each.clone() for each in parameters_of(ours)]
    before = [each.clone() for each in state_of(ours)]
    ours.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    ours.grad_scale = torch.tensor(float("nan"))  # type: ignore[attr-defined]
    take_step(ours, [torch.full((40, 30), float("nan"))])
    after = state_of(ours)
    if first:
        assert torch.equal(parameters_of(ours)[0], values[0])
        assert not any(tensor.any() for tensor in after[1:])
    else:
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def record_state(directory: Path) -> None:
    """Patch a rank: write down its parameters, and its shards of the moments, after each step."""

    def local(tensor: Tensor) -> Tensor:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()

    for strategy in (ddp, fsdp):

        def gather_parameters(optimizer: torch.optim.Optimizer, gather: Any = strategy.gather_parameters) -> None:
            gather(optimizer)
            torch.save([local(tensor) for tensor in state_of(optimizer)], directory / f"rank-{os.environ['RANK']}")

        strategy.gather_parameters = gather_parameters  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(2, []), pytest.param(4, ["--strategy", "fsdp", "--replicas", 2], marks=pytest.mark.slow)],
    ids=["DDP", "hybrid"],
)
def test_replicas_are_equal(
    tiny: list[object], model_with_dropout: Path, tmp_path: Path, ranks: int, extra: list[object]
) -> None:
    """After ten steps, ranks that hold the same parameters have the same bits, although each draws its own dropout."""
    options = [*tiny, *BF16_MOMENTS, *extra, "--model_name_or_path", model_with_dropout, "--max_steps", 10]
    outcome = train(ranks, [*options, "--output_dir", tmp_path], before=partial(record_state, tmp_path))
    assert outcome.exit_codes == [0] * ranks, outcome.output
    assert "optimizer state bfloat16, rounded stochastically" in outcome.output
    states = [torch.load(tmp_path / f"rank-{rank}") for rank in range(ranks)]
    for rank in range(ranks // 2):
        replicas = zip(states[rank], states[rank + ranks // 2], strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in replicas)
    assert {tensor.dtype for tensor in states[0]} == {torch.float32, torch.bfloat16}


@pytest.fixture(scope="module")
def one_process(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("one")
    train_ok(1, *tiny, *BF16_MOMENTS, *BATCH, "--save_steps", 10, "--output_dir", output_dir)
    return output_dir


@pytest.mark.parametrize(
    ("ranks", "extra", "gate"),
    [
        pytest.param(2, [], 1e-4, marks=pytest.mark.slow),
        pytest.param(2, ["--shard_optimizer"], 1e-4, marks=pytest.mark.slow),
        (2, ["--strategy", "fsdp"], 1e-4),
        pytest.param(2, ["--strategy", "fsdp", "--cpu_offload"], 1e-4, marks=pytest.mark.slow),
        # Where columns are split, other bits are drawn.
        pytest.param(4, ["--strategy", "fsdp", "--tensor_parallel", "2"], 1e-3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_curve(
    one_process: Path, tiny: list[object], tmp_path: Path, ranks: int, extra: list[object], gate: float
) -> None:
    """The losses of one process, within 1e-5 as with fp32 moments. A few moments are rounded the other way."""
    train_ok(ranks, *tiny, *BF16_MOMENTS, *BATCH, *extra, "--output_dir", tmp_path)
    rows, references = (read_records(path / "metrics.jsonl") for path in (tmp_path, one_process))
    for row, reference in zip(rows, references, strict=True):
        for key in {"loss", "eval_loss"} & reference.keys():
            assert row[key] == pytest.approx(reference[key], abs=gate / 10)
    ours, theirs = (read_tensors(path / "checkpoint-20" / "model") for path in (tmp_path, one_process))
    assert relative_l2(ours, theirs) < gate


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (3, ["--strategy", "fsdp"]),  # three ranks cannot divide the rows of anything
        pytest.param(2, ["--shard_optimizer"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumed_elsewhere(
    one_process: Path, tiny: list[object], tmp_path: Path, ranks: int, extra: list[object]
) -> None:
    """Other ranks load the state of one process to the bit, in bf16."""
    cut_off_at(10, one_process, tmp_path)
    options = [*tiny, *BF16_MOMENTS, *BATCH, *extra, "--max_steps", 10, "--output_dir", tmp_path]
    outcome = train(
        ranks, [*options, "--resume_from_checkpoint", "auto"], before=partial(save_again, tmp_path / "again")
    )
    assert outcome.exit_codes == [0] * ranks, outcome.output
    assert equal_to_the_bit(tmp_path / "again" / "checkpoint-10", one_process / "checkpoint-10")
    moments = read_tensors(tmp_path / "again" / "checkpoint-10" / "optimizer")
    assert {tensor.dtype for tensor in moments.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_another_dtype_is_converted(tiny: list[object], tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """A checkpoint of fp32 moments resumes in bf16, and the other way around; the start block says it once."""
    options = [*tiny, "--max_steps", 2, "--output_dir", tmp_path]
    assert " moments were " not in train_ok(1, *options, "--optim_state_dtype", dtypes[0])
    options = [*options, "--optim_state_dtype", dtypes[1], "--resume_from_checkpoint", "auto"]
    outcome = train(1, [*options, "--max_steps", 3], before=partial(save_again, tmp_path / "again"))
    assert outcome.exit_codes == [0], outcome.output
    assert outcome.output.count(f"; its moments were {dtypes[0]}, and are {dtypes[1]} now") == 1
    before, after = (read_tensors(path / "checkpoint-2" / "optimizer") for path in (tmp_path, tmp_path / "again"))
    for name, moment in before.items():
        assert after[name].dtype == getattr(torch, dtypes[1])
        assert torch.equal(after[name], moment.to(after[name].dtype))


def test_muon_is_refused() -> None:
    message = refused(*BF16_MOMENTS, "--optim", "muon")
    assert message.startswith("optim_state_dtype bfloat16: cannot be combined with optim muon, whose state is fp32\n")
