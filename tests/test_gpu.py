"""Proves train.py, loss/ and model/ on a GPU with compiled layers: one rank over NCCL, two on one GPU over gloo."""

import math
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

import config
from compare.memory import CASES, GIB, MODELS, measuring, predict_case
from config.options import Options
from data.batches import IGNORE_INDEX, to_device
from loss.cross_entropy import cross_entropy_, head_and_loss_sum, softmax_, token_loss_sum
from loss.next_token import NextToken, fastest_softmax
from metrics.recorder import Recorder
from metrics.records import read_records
from model.documents.attention import NAME, attend_within_documents
from model.documents.recurrent import stateful_kinds
from model.float8 import CAPABILITY, E4M3, E5M2, product, to_float8
from tests import world
from tests.launch import train, train_ok
from tests.proof import read_tensors, relative_l2
from tests.test_packing import loss_and_gradient, packed_and_alone, sliding_model
from tests.test_recurrent import FAMILIES as STATEFUL
from tests.test_recurrent import make_model as make_stateful
from tests.test_recurrent import packed_and_alone as long_and_alone
from tests.test_resume import equal_to_the_bit

float8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY,
    reason="the GPU has no float8 matrix products",
)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(scope="module")
def one_rank(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one rank, fp32, not compiled. The runs that are compared with it have compiled layers."""
    output_dir = tmp_path_factory.mktemp("one")
    plain = ["--bf16", "false", "--torch_compile", "false"]
    train_ok(1, *tiny, "--output_dir", output_dir, *plain, "--save_steps", 10)
    return output_dir


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, ["--strategy", "fsdp"]),
        (1, ["--shard_optimizer"]),
        (2, ["--ddp_backend", "gloo"]),
        (2, ["--ddp_backend", "gloo", "--shard_optimizer"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--gradient_checkpointing"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--sync_each_batch"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--reshard_after_forward", "false"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--replicas", "2"]),
        (2, ["--ddp_backend", "gloo", "--context_parallel", "2"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--context_parallel", "2", "--gradient_checkpointing"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--gradient_checkpointing", "--offload_activations"]),
        (1, ["--strategy", "fsdp", "--cpu_offload"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp", "--cpu_offload"]),
        (1, ["--gradient_checkpointing", "--offload_activations"]),
        (1, ["--activation_memory_budget", "0.3"]),
        pytest.param(2, ["--strategy", "fsdp", "--tensor_parallel", "2"], marks=two_gpus),
        pytest.param(2, ["--strategy", "fsdp"], marks=two_gpus),
        pytest.param(2, ["--strategy", "fsdp", "--context_parallel", "2"], marks=two_gpus),
        pytest.param(2, ["--strategy", "fsdp", "--reshard_after_forward", "false"], marks=two_gpus),
        pytest.param(2, ["--shard_optimizer"], marks=two_gpus),
        pytest.param(2, [], marks=two_gpus),
    ],
    ids=str,
)
def test_same_curve(one_rank: Path, tiny: list[object], tmp_path: Path, world_size: int, extra: list[str]) -> None:
    train_ok(world_size, *tiny, "--output_dir", tmp_path, "--bf16", "false", "--dataloader_num_workers", 2, *extra)
    for record, reference in zip(
        read_records(tmp_path / "metrics.jsonl"), read_records(one_rank / "metrics.jsonl"), strict=True
    ):
        for key in ("loss", "eval_loss"):
            if key in reference:
                assert record[key] == pytest.approx(reference[key], abs=1e-5)
        if "loss" in reference:
            assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
            assert record["peak_memory_gib"] > 0
    expected = load_file(one_rank / "model.safetensors")
    assert relative_l2(load_file(tmp_path / "model.safetensors"), expected) < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--bf16_residual"],
        ["--activation_memory_budget", "0.5"],
        ["--gradient_checkpointing"],
        pytest.param(["--float8"], marks=float8),
        pytest.param(["--float8", "--gradient_checkpointing"], marks=float8),
    ],
    ids=str,
)
def test_bf16_stays_near(one_rank: Path, tiny: list[object], tmp_path: Path, strategy: str, more: list[str]) -> None:
    """bf16 or float8 compute with fp32 master weights: the curve stays near that of fp32, and checkpoints are fp32."""
    train_ok(1, *tiny, "--output_dir", tmp_path, "--strategy", strategy, *more)
    records, references = (read_records(path / "metrics.jsonl") for path in (tmp_path, one_rank))
    assert records[1]["grad_norm"] == pytest.approx(references[1]["grad_norm"], rel=2e-2)
    assert records[1]["grad_norm"] != references[1]["grad_norm"], "it must have computed in bf16"
    for record, reference in zip(records, references, strict=True):
        if "loss" in reference:
            assert record["loss"] == pytest.approx(reference["loss"], abs=2e-2)
    saved = read_tensors(tmp_path / "checkpoint-20" / "model")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@float8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("left_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("transposed", [False, True])
def test_float8_product(left_dtype: torch.dtype, dtype: torch.dtype, transposed: bool) -> None:
    """The three float8 products of a linear module, in each output dtype, are near those in fp32."""
    torch.manual_seed(0)
    left, right = torch.randn(400, 48, device="cuda"), torch.randn(48, 80, device="cuda")
    (left8, left_scale), (right8, right_scale) = to_float8(left, left_dtype), to_float8(right, E4M3)
    if transposed:  # another memory layout of equal values
        left8, right8 = left8.T.contiguous().T, right8.T.contiguous().T
    for fast in (False, True):
        ours = product(left8, right8, left_scale, right_scale, dtype, fast)
        assert ours.dtype == dtype
        assert 1e-2 < ((ours - left @ right).norm() / (left @ right).norm()).item() < 8e-2


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, []),
        (1, ["--gradient_checkpointing"]),
        (2, ["--ddp_backend", "gloo", "--context_parallel", "2"]),
    ],
    ids=str,
)
def test_packed_documents_compiled(tiny: list[object], tmp_path: Path, world_size: int, more: list[str]) -> None:
    """Variable-length attention in compiled layers: the curve stays near that of a mask in fp32, not compiled."""
    packed = [*tiny, "--packing", "documents", "--max_steps", 10]
    train_ok(1, *packed, "--output_dir", tmp_path / "plain", "--bf16", "false", "--torch_compile", "false")
    train_ok(world_size, *packed, "--output_dir", tmp_path / "fast", *more)
    records, references = (read_records(tmp_path / name / "metrics.jsonl") for name in ("fast", "plain"))
    for record, reference in zip(records, references, strict=True):
        for key in {"loss", "eval_loss"} & reference.keys():
            assert record[key] == pytest.approx(reference[key], abs=2e-2)


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [(1, []), (1, ["--gradient_checkpointing"]), (2, ["--ddp_backend", "gloo", "--strategy", "fsdp"])],
)
def test_preference(dpo: list[object], tmp_path: Path, world_size: int, extra: list[str]) -> None:
    """In bf16, the DPO loss starts at ln 2 and falls, because the log-probabilities of the reference stay fp32."""
    train_ok(world_size, *dpo, "--output_dir", tmp_path, *extra)
    losses = [record["eval_loss"] for record in read_records(tmp_path / "metrics.jsonl") if "eval_loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("more", [[], ["--offload_activations"]], ids=str)
def test_checkpointing_repeats_the_dropout(
    tiny: list[object], model_with_dropout: Path, tmp_path: Path, more: list[str]
) -> None:
    """In compiled layers, the recomputed forward pass draws the same dropout, also with its inputs in host memory."""
    options = [*tiny, "--model_name_or_path", model_with_dropout, "--bf16", "false", "--max_steps", 4]
    train_ok(1, *options, "--output_dir", tmp_path / "off")
    train_ok(1, *options, "--output_dir", tmp_path / "on", "--gradient_checkpointing", *more)
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl") for name in ("on", "off"))
    for record, expected in zip(ours, theirs, strict=True):
        for key in {"loss", "grad_norm"} & expected.keys():
            assert record[key] == pytest.approx(expected[key], rel=1e-5)


def test_memory_that_offload_saves(tmp_path: Path) -> None:
    """12 layers of 8 million parameters: host memory takes weights, gradients and moments, then layer inputs too."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    config.save_pretrained(tmp_path / "shape")
    options: list[object] = ["--config_name", tmp_path / "shape", "--block_size", 2048, "--max_steps", 2]
    options += ["--validation_split_percentage", 0, "--per_device_train_batch_size", 8, "--dataloader_num_workers", 0]
    options += ["--data_cache_dir", tmp_path / "cache", "--strategy", "fsdp", "--gradient_checkpointing"]
    options += ["--save_steps", 0, "--logging_steps", 1, "--tokenizer_name", tmp_path / "tokens"]
    world.make_model(tmp_path / "tokens")
    options += ["--train_file", world.make_train_file(tmp_path / "text.jsonl")]
    peaks = []
    for name, more in {
        "on the GPU": [],
        "offloaded": ["--cpu_offload"],
        "inputs": ["--cpu_offload", "--offload_activations"],
    }.items():
        train_ok(1, *options, *more, "--output_dir", tmp_path / name)
        peaks.append(read_records(tmp_path / name / "metrics.jsonl")[-1]["peak_memory_gib"])
    parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "on the GPU" / "model.safetensors").values())
    layer_input = 8 * 2048 * 1024 * 2
    assert peaks[0] - peaks[1] > 11 * parameters / 2**30  # master weights and moments take 12 bytes per parameter
    assert peaks[1] - peaks[2] > 0.6 * 12 * layer_input / 2**30


def nan_in_step_2() -> None:
    """Patch a rank: the loss of the first micro-batch of its second step is NaN."""
    original, calls = NextToken.forward, iter(range(10_000))

    def forward(self: NextToken, *inputs: Any, **named: Any) -> Tensor:
        loss = original(self, *inputs, **named)
        return loss * float("nan") if self.training and next(calls) == 4 else loss

    NextToken.forward = forward  # type: ignore[method-assign]


def test_offloaded_optimizer_skips(tiny: list[object], tmp_path: Path) -> None:
    """The flag reaches AdamW on the CPU: a step with a non-finite gradient changes no parameter."""
    options = [*tiny, "--output_dir", tmp_path, "--max_steps", 3, "--save_steps", 1, "--strategy", "fsdp"]
    outcome = train(1, [*options, "--cpu_offload", "--validation_split_percentage", 0], before=nan_in_step_2)
    assert outcome.exit_codes == [0], outcome.output
    assert [record["skipped_steps"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 1]
    first, second, third = (read_tensors(tmp_path / f"checkpoint-{step}" / "model") for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)


def forbid_synchronization() -> None:
    """Patch a rank: from the report of its second step to the end of its fourth, synchronizing with the GPU fails."""
    end_of_step, check_skipped, calls = Recorder.step, config.check_skipped, iter(range(1, 100))

    def step(*arguments: Any) -> None:
        end_of_step(*arguments)
        if next(calls) == 4:
            torch.cuda.set_sync_debug_mode("default")

    def check(options: Options, step: int, skipped: int) -> None:
        check_skipped(options, step, skipped)
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")

    Recorder.step, config.check_skipped = step, check  # type: ignore[assignment, method-assign]


GRAPHED = [
    (1, ["--per_device_train_batch_size", "16"]),
    (1, ["--per_device_train_batch_size", "8", "--gradient_checkpointing", "--optim", "muon"]),
    (1, ["--strategy", "fsdp", "--per_device_train_batch_size", "16"]),
    (1, ["--strategy", "fsdp", "--per_device_train_batch_size", "4"]),
    (1, ["--strategy", "fsdp", "--per_device_train_batch_size", "8", "--reshard_after_forward", "false"]),
    pytest.param(2, ["--strategy", "fsdp"], marks=two_gpus),
    pytest.param(2, ["--strategy", "fsdp", "--tensor_parallel", "2"], marks=two_gpus),
    pytest.param(2, ["--strategy", "fsdp", "--context_parallel", "2"], marks=two_gpus),
]


@pytest.mark.parametrize(("world_size", "extra"), GRAPHED, ids=str)
def test_cuda_graphs(tiny: list[object], tmp_path: Path, world_size: int, extra: list[str]) -> None:
    """CUDA graphs, with evaluations and checkpoints between them and a resume, train to the bit as the plain path."""
    options = [*tiny, "--packing", "concat", *extra, "--full_determinism", "--eval_steps", 7, "--save_steps", 12]
    for graphs in ("false", "true"):
        train_ok(world_size, *options, "--cuda_graphs", graphs, "--output_dir", tmp_path / graphs)
    shutil.copytree(tmp_path / "true", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-20")
    train_ok(world_size, *options, "--resume_from_checkpoint", "auto", "--output_dir", tmp_path / "resumed")
    plain, replayed, again = (curve(tmp_path / name) for name in ("false", "true", "resumed"))
    assert replayed == plain
    assert again == plain
    expected, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("false", "true", "resumed"))
    assert all(torch.equal(tensor, other[name]) for other in others for name, tensor in expected.items())


def curve(output_dir: Path) -> list[tuple[Any, ...]]:
    """What a run measured of its training: losses, norms and evaluations, by step."""
    keys = ("step", "loss", "grad_norm", "eval_loss")
    return [tuple(record.get(key) for key in keys) for record in read_records(output_dir / "metrics.jsonl")]


def count_forwards() -> None:
    """Patch a rank: it prints how often the forward function of the objective is called in training."""
    original, close, calls = NextToken.forward, Recorder.close, [0]

    def forward(self: NextToken, *inputs: Any, **named: Any) -> Tensor:
        calls[0] += torch.is_grad_enabled()
        return original(self, *inputs, **named)

    def close_and_print(self: Recorder, *inputs: Any) -> None:
        print(f"forwards in training: {calls[0]}")
        close(self, *inputs)

    NextToken.forward, Recorder.close = forward, close_and_print  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(("micro_batch", "recorded"), [(16, 1), (8, 2), (4, 3)])
def test_cuda_graphs_replace_forwards(tiny: list[object], tmp_path: Path, micro_batch: int, recorded: int) -> None:
    """After three steps, each kind of micro-step (first, middle, last) is recorded once, and Python runs no more."""
    options = [*tiny, "--packing", "concat", "--max_steps", 8, "--per_device_train_batch_size", micro_batch]
    outcome = train(1, [*options, "--output_dir", tmp_path], before=count_forwards)
    assert outcome.exit_codes == [0], outcome.output
    assert f"forwards in training: {3 * 16 // micro_batch + recorded}\n" in outcome.output
    assert "launched as CUDA graphs" in outcome.output


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_steps_do_not_synchronize(tiny: list[object], tmp_path: Path, strategy: str) -> None:
    """Between two reports, the CPU never waits for the GPU, so that it can queue work ahead."""
    options = [*tiny, "--output_dir", tmp_path, "--strategy", strategy, "--validation_split_percentage", 0]
    outcome = train(
        1, [*options, "--logging_steps", 2, "--max_steps", 4, "--save_steps", 0], before=forbid_synchronization
    )
    assert outcome.exit_codes == [0], outcome.output


@pytest.mark.parametrize("compiled", [False, True])
def test_head_and_loss(compiled: bool) -> None:
    """bf16 gradients stay near those of fp32 from all logits, and memory never holds all logits."""
    torch.manual_seed(0)
    hidden_BTD = torch.randn(4, 4096, 64, device="cuda", requires_grad=True)
    weight_VD = torch.randn(131_072, 64, device="cuda", requires_grad=True)
    labels_BT = torch.randint(0, 131_072, (4, 4096), device="cuda")
    labels_BT[1, 100:] = IGNORE_INDEX

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(("hidden", "weight"), torch.autograd.grad(loss, [hidden_BTD, weight_VD]), strict=True))

    expected = gradients(token_loss_sum(hidden_BTD[:2] @ weight_VD.T, labels_BT[:2]))
    in_place = partial(cross_entropy_, softmax_=fastest_softmax() if compiled else softmax_)
    with torch.autocast("cuda", torch.bfloat16):
        loss = head_and_loss_sum(hidden_BTD[:2], weight_VD, None, labels_BT[:2], in_place)
    assert 1e-4 < relative_l2(gradients(loss), expected) < 2e-2

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        gradients(head_and_loss_sum(hidden_BTD, weight_VD, None, labels_BT, in_place))
    all_logits_in_fp32 = labels_BT.numel() * len(weight_VD) * 4
    assert torch.cuda.max_memory_allocated() - before < all_logits_in_fp32 * (0.25 if compiled else 0.75)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [384, 8192, 151_936])
def test_softmax(vocabulary: int, dtype: torch.dtype) -> None:
    """The kernel equals the plain softmax. A NaN or an infinite logit makes all of its row NaN."""
    torch.manual_seed(0)
    logits = (torch.randn(40, vocabulary, device="cuda") * 5).to(dtype)
    logits[3, 17], logits[4, -1] = float("nan"), float("inf")
    targets = torch.randint(0, vocabulary, (40, 1), device="cuda")
    expected, ours = logits.clone(), logits.clone()
    expected_log_p, log_p = softmax_(expected, targets), fastest_softmax()(ours, targets)
    torch.testing.assert_close(log_p, expected_log_p, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=0, equal_nan=True)
    assert log_p.isnan().sum() == 2
    assert ours.isnan().any(dim=1).sum() == 2


def test_resume_on_other_ranks(one_rank: Path, tiny: list[object], tmp_path: Path) -> None:
    """Saved by one DDP rank over NCCL, resumed by two FSDP ranks over gloo."""
    shutil.copytree(one_rank / "checkpoint-10", tmp_path / "checkpoint-10")
    options = ["--bf16", "false", "--strategy", "fsdp", "--ddp_backend", "gloo", "--resume_from_checkpoint", "auto"]
    train_ok(2, *tiny, "--output_dir", tmp_path, *options)
    expected = load_file(one_rank / "model.safetensors")
    assert relative_l2(load_file(tmp_path / "model.safetensors"), expected) < 1e-5
    assert equal_to_the_bit(tmp_path / "checkpoint-10", one_rank / "checkpoint-10")


@pytest.mark.parametrize("model_name", ["full_attention", "sliding_window"])
def test_attention_within_documents(model_dir: Path, model_name: str) -> None:
    """Variable-length attention in bf16: loss and gradient stay near those of each document alone in fp32."""
    device = torch.device("cuda")
    model = sliding_model() if "sliding" in model_name else AutoModelForCausalLM.from_pretrained(model_dir)
    packed, alone = packed_and_alone()
    packed, *alone = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in (packed, *alone))
    expected_loss, expected = loss_and_gradient(model.to(device), alone)
    attend_within_documents(model, device, bf16=True)
    assert model.config._attn_implementation == NAME
    loss, gradient = loss_and_gradient(model, [packed], bf16=True)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert 1e-4 < relative_l2(gradient, expected) < 2e-2


@pytest.mark.parametrize("number", [0, 2, 3, 5, 8, 14, 19, 21, 24, 25, 26, 28, 30, 32, 33, *range(34, 54)])
def test_memory_is_as_predicted(number: int) -> None:
    """The prediction is within 10% of what the GPU allocates on a single rank or for a mixture, and 5% on others.

    `python -m compare.memory` has more cases.
    """
    with measuring(CASES[number]) as measured:
        predicted, is_dense = predict_case(CASES[number]), "num_experts" not in MODELS[CASES[number].model]
        tolerance = 0.05 if CASES[number].ranks > 1 and is_dense else 0.1
        assert predicted.total / GIB == pytest.approx(measured.result(), rel=tolerance)


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, ["--strategy", "fsdp"]),
        (2, ["--ddp_backend", "gloo"]),
        (2, ["--ddp_backend", "gloo", "--shard_optimizer"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp"]),
        pytest.param(2, ["--strategy", "fsdp"], marks=two_gpus),
    ],
    ids=str,
)
def test_muon(tiny: list[object], tmp_path: Path, world_size: int, extra: list[str]) -> None:
    """Muon on shards of matrices, which ranks communicate, trains like Muon on full matrices."""
    options = [*tiny, "--optim", "muon", "--bf16", "false"]
    train_ok(1, *options, "--output_dir", tmp_path / "one")
    train_ok(world_size, *options, "--output_dir", tmp_path / "other", *extra)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "one"))
    assert relative_l2(ours, theirs) < 1e-5


@pytest.fixture(scope="module")
def bf16_moments(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, fp32, with a compiled update of bf16 moments."""
    output_dir = tmp_path_factory.mktemp("moments")
    train_ok(1, *tiny, "--bf16", "false", "--optim_state_dtype", "bfloat16", "--output_dir", output_dir)
    return output_dir


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, ["--torch_compile", "false"]),
        (1, ["--strategy", "fsdp"]),
        (2, ["--ddp_backend", "gloo", "--strategy", "fsdp"]),
        pytest.param(2, ["--shard_optimizer"], marks=two_gpus),
        pytest.param(2, ["--strategy", "fsdp"], marks=two_gpus),
    ],
    ids=str,
)
def test_bf16_moments(
    bf16_moments: Path, tiny: list[object], tmp_path: Path, world_size: int, extra: list[str]
) -> None:
    """All ranks round as one rank does. A few moments are rounded the other way, as gradients differ in a last bit."""
    options = [*tiny, "--bf16", "false", "--optim_state_dtype", "bfloat16"]
    train_ok(world_size, *options, *extra, "--output_dir", tmp_path)
    records, references = (read_records(path / "metrics.jsonl") for path in (tmp_path, bf16_moments))
    for record, reference in zip(records, references, strict=True):
        for key in {"loss", "eval_loss"} & reference.keys():
            assert record[key] == pytest.approx(reference[key], abs=1e-5)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, bf16_moments))
    assert relative_l2(ours, theirs) < 1e-4


@pytest.mark.parametrize(("bf16", "gate"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_layers_with_a_state_restart(name: str, bf16: bool, gate: float) -> None:
    """Packed documents give the loss and gradient of the documents alone, with the kernels that are installed."""
    device = torch.device("cuda")
    model = make_stateful(STATEFUL[name][0]).to(device)
    packed, alone = long_and_alone()
    moved = to_device(packed, device)
    assert "on_cpu" in vars(moved["document_ends"])
    expected_loss, expected = loss_and_gradient(model, [to_device(batch, device) for batch in alone], bf16)
    assert stateful_kinds(model)
    loss, gradient = loss_and_gradient(model, [moved], bf16)
    assert loss == pytest.approx(expected_loss, rel=gate)
    assert relative_l2(gradient, expected) < gate


def ask_for_too_much() -> None:
    """Let the first forward pass ask for more memory than a GPU has."""

    def forward(*args: object, **kwargs: object) -> None:
        torch.empty(2**50, device="cuda")

    NextToken.forward = forward  # type: ignore[method-assign,assignment]


def test_memory_snapshot(tiny: list[object], tmp_path: Path) -> None:
    """Out of memory, it has what was allocated, the allocation that failed, and the stack of each."""
    argv = [*tiny, "--output_dir", tmp_path, "--memory_snapshot", "--torch_compile", "false"]
    outcome = train(1, argv, before=ask_for_too_much)
    assert outcome.exit_codes == [1], outcome.output
    path = tmp_path / "memory" / "rank-0.pickle"
    assert f"memory snapshot: {path}, for https://pytorch.org/memory_viz" in outcome.output
    snapshot = pickle.loads(path.read_bytes())
    assert snapshot["segments"]
    traces = [entry for trace in snapshot["device_traces"] for entry in trace]
    assert any(entry["action"] == "oom" for entry in traces)
    assert any(frame["filename"].endswith("ddp/wrap.py") for entry in traces for frame in entry["frames"])
