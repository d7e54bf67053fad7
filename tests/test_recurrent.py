"""Proves model/documents/recurrent.py: layers that carry a state from token to token restart at each document."""

import inspect
import json
import random
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    Zamba2Config,
)
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from data.batches import collate
from data.sequences import Sequence
from metrics.records import read_records
from model.documents import kernels
from model.documents.recurrent import group_documents, restart_at_documents, restarts_at_documents, stateful_kinds
from model.documents.trial import document_obstacle, keep_documents_apart
from tests.launch import train_ok
from tests.proof import Case, first_gradient, read_tensors, relative_l2
from tests.test_packing import loss_and_gradient, packed_row, tokens_of_documents
from tests.zoo import config as zoo_config

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
DELTA_RULE = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 64, "mamba_expand": 2}
TYPES = ["linear_attention", "full_attention", "linear_attention"]

# Configuration, and the class that is computed for each document alone.
FAMILIES: dict[str, tuple[PretrainedConfig, str]] = {
    "qwen3_next": (
        Qwen3NextConfig(**SIZES, **EXPERTS, **DELTA_RULE, head_dim=8, num_experts=4, layer_types=TYPES),
        "Qwen3NextGatedDeltaNet",
    ),
    "granite4": (
        GraniteMoeHybridConfig(
            **SIZES, **MAMBA, num_local_experts=4, num_experts_per_tok=2, layer_types=TYPES, shared_intermediate_size=16
        ),
        "GraniteMoeHybridMambaLayer",
    ),
    "lfm2": (Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]), "Lfm2ShortConv"),
    "mamba2": (
        Mamba2Config(vocab_size=384, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=64),
        "Mamba2Mixer",
    ),
}


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with values that let states and convolutions reach far."""
    torch.manual_seed(0)
    config.num_hidden_layers = 3
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def packed_and_alone() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two packed sequences with padding, and each document alone. Lengths: 1, a chunk, two, three with a rest."""
    documents = tokens_of_documents([1, 64, 9, 130, 128, 2, 70], 384)
    sequences = [packed_row(documents[:4]), packed_row(documents[4:], 1)]
    alone = []
    for sequence in sequences:
        ends = torch.tensor([0, *sequence.segment_lengths]).cumsum(0).tolist()
        for start, end in pairwise(ends):
            part = slice(start, end)
            alone.append(collate([Sequence(0, sequence.tokens[part], sequence.trained_on[part], [end - start])]))
    return collate(sequences, padded_length=224), alone


# The other families whose layers carry a state.
SLOW_FAMILIES: dict[str, tuple[PretrainedConfig, str]] = {
    "qwen3_5": (Qwen3_5TextConfig(**SIZES, **DELTA_RULE, head_dim=8, layer_types=TYPES), "Qwen3_5GatedDeltaNet"),
    "qwen3_5_moe": (
        Qwen3_5MoeTextConfig(**SIZES, **EXPERTS, **DELTA_RULE, head_dim=8, num_experts=4, layer_types=TYPES),
        "Qwen3_5MoeGatedDeltaNet",
    ),
    "olmo_hybrid": (
        OlmoHybridConfig(**SIZES, **DELTA_RULE, layer_types=TYPES, pad_token_id=0),
        "OlmoHybridGatedDeltaNet",
    ),
    "minimax": (
        MiniMaxConfig(**SIZES, head_dim=8, layer_types=TYPES, num_local_experts=4, block_size=32),
        "MiniMaxLightningAttention",
    ),
    "falcon_h1": (FalconH1Config(**SIZES, **MAMBA, mamba_d_ssm=64, head_dim=8), "FalconH1Mixer"),
    "bamba": (BambaConfig(**SIZES, **MAMBA, attn_layer_indices=[1]), "BambaMixer"),
    "jamba": (
        JambaConfig(**SIZES, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, num_experts=4),
        "JambaMambaMixer",
    ),
    "zamba2": (
        Zamba2Config(
            **SIZES,
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=4,
            chunk_size=64,
            num_mem_blocks=1,
        ),
        "Zamba2MambaMixer",
    ),
    "nemotron_h": (
        NemotronHConfig(
            **SIZES,
            layers_block_type=["linear_attention", "full_attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            chunk_size=64,
            n_groups=2,
            head_dim=8,
        ),
        "NemotronHMamba2Mixer",
    ),
    "kimi_linear": (zoo_config("kimi_linear"), "KimiLinearDeltaAttention"),
    "mamba": (MambaConfig(vocab_size=384, hidden_size=32, state_size=8), "MambaMixer"),
    "falcon_mamba": (FalconMambaConfig(vocab_size=384, hidden_size=32, state_size=8), "FalconMambaMixer"),
    "recurrent_gemma": (
        RecurrentGemmaConfig(**SIZES, lru_width=32, head_dim=8, attention_window_size=32),
        "RecurrentGemmaRecurrentBlock",
    ),
    "lfm2_moe": (
        Lfm2MoeConfig(**SIZES, layer_types=["conv", "full_attention", "conv"], num_experts=4, num_dense_layers=1),
        "Lfm2MoeShortConv",
    ),
}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_packed_is_one_by_one(name: str) -> None:
    """Loss and gradient of packed sequences equal those of the documents alone. Without the restart, they do not."""
    config, kind = (FAMILIES | SLOW_FAMILIES)[name]
    model = make_model(config)
    packed, alone = packed_and_alone()
    expected_loss, expected = loss_and_gradient(model, alone)
    _, leaking = loss_and_gradient(model, [packed])
    assert kind in {found.__name__ for found in stateful_kinds(model)}
    loss, gradient = loss_and_gradient(model, [packed])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_l2(gradient, expected) < 1e-5
    # Rounding: padding a document alone changes the gradients of decays by 2e-5.
    for parameter in expected:
        assert relative_l2({"": gradient[parameter]}, {"": expected[parameter]}) < 1e-4, parameter
    assert relative_l2(leaking, expected) > 1e-3


class LeakingMean(nn.Module):
    """A layer of no known kind: it adds the mean of all tokens up to each token."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        count_T1 = torch.arange(1, hidden_BTD.shape[1] + 1)[:, None]
        output: Tensor = self.inside(hidden_BTD) + hidden_BTD.cumsum(dim=1) / count_T1
        return output


def test_unknown_layer_is_found(model_dir: Path) -> None:
    """A layer that nobody has named restarts, too. Nothing changes in a model whose documents stay apart."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert stateful_kinds(model) == set()
    assert not restarts_at_documents(model)
    model.model.layers[1].mlp = LeakingMean(model.model.layers[1].mlp)
    packed, alone = packed_and_alone()
    expected_loss, expected = loss_and_gradient(model, alone)
    assert stateful_kinds(model) == {LeakingMean}
    loss, gradient = loss_and_gradient(model, [packed])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_l2(gradient, expected) < 1e-5


def test_masks_are_split() -> None:
    """Attention whose mask ignores documents, with a window: documents do not see each other, nor the padding."""
    model = make_model(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16))
    packed, alone = packed_and_alone()
    expected_loss, expected = loss_and_gradient(model, alone)
    restart_at_documents(model, {type(model.model.layers[0].self_attn)})
    loss, gradient = loss_and_gradient(model, [packed])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_l2(gradient, expected) < 1e-5


def test_groups() -> None:
    """No document is shorter than half of its group's longest, unless that is short. Each document is in one group."""
    generator = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(1, 4096, (200,), generator=generator).tolist(), 1, 2, 60, 64]
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    groups = group_documents(ends)
    assert sorted(document for group in groups for document in group) == list(pairwise(ends))
    assert len(groups) <= 7
    for group in groups:
        sizes = [end - start for start, end in group]
        assert 2 * min(sizes) >= max(sizes) or max(sizes) <= 64


class StandIn:
    """A kernel with the signature of a package, which computes each document alone by the torch function `reference`.

    `fault` is the function of its results that a faulty kernel computes, and whether that ignores documents.
    """

    def __init__(self, reference: Callable[..., Any], fault: str) -> None:
        self.reference, self.fault = reference, fault
        self.with_documents = self.without = 0

    def compute(self, dim: int, ends: Tensor | None, sequences: list[Any], *others: Any, **named: Any) -> Any:
        """The results, where `sequences` and results have the tokens at dimension `dim`."""
        if ends is None or self.fault == "it ignores documents":
            self.without += ends is None
            return self.reference(*sequences, *others, **named)
        assert len(sequences[0]) == 1, "flash-linear-attention refuses several sequences with ends of documents"
        self.with_documents += 1
        sizes = ends.diff().tolist()
        parts = zip(*(each.split(sizes, dim) for each in sequences), strict=True)
        results = [self.reference(*part, *others, **named) for part in parts]
        is_pair = isinstance(results[0], tuple)
        output: Tensor = torch.cat([result[0] if is_pair else result for result in results], dim)
        if self.fault == "its gradient ignores documents":
            output = output + 0.1 * (output.mean(dim, keepdim=True) - output.mean(dim, keepdim=True).detach())
        return (output, None) if is_pair else output

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        **others: Any,
    ) -> Any:
        assert (cu_seqlens is None) == (cu_seqlens_cpu is None)
        return self.compute(1, cu_seqlens, [q, k, v, g, beta], use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)

    chunk_kda = chunk_gated_delta_rule

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: None = None,
        dt_bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
    ) -> Any:
        ends = None if seq_idx is None else ends_of(seq_idx)
        named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}

        def reference(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Any:
            return original(x, dt, A, b, c, chunk_size, **named)

        original, self.reference = self.reference, reference
        result = self.compute(1, ends, [x, dt, B, C])
        self.reference = original
        return result

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        return self.compute(2, None if seq_idx is None else ends_of(seq_idx), [x], weight, bias, activation)


def ends_of(documents_1T: Tensor) -> Tensor:
    """0 and the end of each document, from the number of the document at each position."""
    return torch.tensor([0, *documents_1T[0].bincount().cumsum(0).tolist()])


def install(kernel: str, config: PretrainedConfig, fault: str, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Make transformers find a stand-in for `kernel` where it finds an installed package."""
    modeling = sys.modules[type(make_model(config)).__module__]
    monkeypatch.setattr(modeling, "causal_conv1d_fn", modeling.causal_conv1d_fn)  # the trial may replace it
    name = {
        "mamba_chunk_scan_combined": "mamba2_chunk_scan",
        "chunk_kda": "chunk_kimi_delta_attention",
        "chunk_gated_delta_rule": "torch_chunk_gated_delta_rule",
    }.get(kernel, kernel)
    reference = inspect.unwrap(getattr(modeling, name))
    stand_in = StandIn(reference, fault)
    package = ModuleType("kernel_package")
    setattr(package, kernel, getattr(stand_in, kernel))
    monkeypatch.setitem(sys.modules, "kernel_package", package)
    monkeypatch.setattr("transformers.integrations.hub_kernels._KERNELS_INTERNAL_PATH_MAPPINGS", {})
    monkeypatch.setattr(modeling, name, use_kernel_func_from_hub_with_fallback(kernel, "kernel_package")(reference))
    return stand_in


def in_one_call(model: nn.Module) -> set[str]:
    """The classes of modules that compute all documents in one call."""
    changed = [module for module in model.modules() if "forward" in vars(module)]
    calls = {type(module).__name__: inspect.unwrap(module.forward) for module in changed}
    return {name for name, call in calls.items() if call.func is kernels.in_one_call}


# Family, and the kernel that a package has for it. Without a package for its convolution, that has gaps of zeros.
KERNELS = [
    ("qwen3_next", "chunk_gated_delta_rule"),
    ("qwen3_5", "chunk_gated_delta_rule"),
    ("kimi_linear", "chunk_kda"),
    ("mamba2", "mamba_chunk_scan_combined"),
    ("granite4", "mamba_chunk_scan_combined"),
    ("falcon_h1", "mamba_chunk_scan_combined"),
    ("lfm2", "causal_conv1d_fn"),
]
FAULTS = ["", "it ignores documents", "its gradient ignores documents"]
QUICK = [("qwen3_next", "chunk_gated_delta_rule"), ("mamba2", "mamba_chunk_scan_combined")]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "kernel"), [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in KERNELS]
)
def test_kernels_get_the_documents(name: str, kernel: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that knows documents computes all in one call. A kernel with a fault gets one document at a time."""
    config, kind = (FAMILIES | SLOW_FAMILIES)[name]
    model = make_model(config)
    packed, alone = packed_and_alone()
    expected_loss, expected = loss_and_gradient(model, alone)
    monkeypatch.setattr("model.documents.trial._results", {})
    stand_in = install(kernel, config, fault, monkeypatch)
    assert document_obstacle(config) == ""
    assert (stand_in.with_documents, stand_in.without) == (0, 0), "kernels do not run on the CPU"
    keep_documents_apart(model, torch.device("cpu"), bf16=False)
    is_convolution = kernel == "causal_conv1d_fn"  # with a fault, the torch function has gaps of zeros
    assert in_one_call(model) == (set() if fault and not is_convolution else {kind})
    stand_in.with_documents = stand_in.without = 0
    loss, gradient = loss_and_gradient(model, [packed])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_l2(gradient, expected) < 1e-5
    assert (stand_in.with_documents > 0) == (not fault)
    assert (stand_in.without > 0) == bool(fault)


DOCUMENTS, SEQUENCES = 46, 16


@pytest.fixture(scope="module")
def hybrid(tiny: list[object], model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options for steps that train a Qwen3-Next on all documents at once. None is longer than a sequence."""
    directory = tmp_path_factory.mktemp("hybrid")
    shutil.copytree(model_dir, directory / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    make_model(FAMILIES["qwen3_next"][0]).save_pretrained(directory / "model")
    draw, file = random.Random(3), directory / "documents.jsonl"
    texts = ["the licence of software " * draw.randint(1, 2) + "a" * draw.randint(1, 9) for _ in range(DOCUMENTS)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [*tiny, "--model_name_or_path", directory / "model", "--train_file", file]


@pytest.mark.slow
def test_packed_run_is_the_unpacked_run(hybrid: list[object], tmp_path: Path) -> None:
    """Gradient and loss of the first step on all documents: alone on one rank, and packed on two with checkpointing."""
    unpacked = [*hybrid, "--packing", "none", "--global_batch_size", DOCUMENTS]
    expected = first_gradient(Case("alone", 1, DOCUMENTS), unpacked, tmp_path / "alone")
    packed = [*hybrid, "--packing", "documents", "--global_batch_size", SEQUENCES, "--gradient_checkpointing"]
    gradient = first_gradient(Case("packed", 2, 8, ("--strategy", "fsdp")), packed, tmp_path / "packed")
    records = [read_records(tmp_path / name / "metrics.jsonl")[-1] for name in ("alone", "packed")]
    assert records[1]["tokens_seen"] == records[0]["tokens_seen"], "all documents are in the step"
    assert records[1]["loss"] == pytest.approx(records[0]["loss"], abs=1e-5)
    assert relative_l2(gradient, expected) < 1e-5


@pytest.mark.slow
def test_resumed_run_is_the_run(hybrid: list[object], tmp_path: Path) -> None:
    """Four steps on two ranks, and two steps that are resumed for two more, end with equal weights."""
    options = [*hybrid, "--packing", "documents", "--global_batch_size", 4, "--per_device_train_batch_size", 1]
    options += ["--strategy", "fsdp", "--lr_scheduler_type", "constant_with_warmup", "--validation_split_percentage", 0]
    train_ok(2, *options, "--max_steps", 4, "--output_dir", tmp_path / "run")
    train_ok(2, *options, "--max_steps", 2, "--output_dir", tmp_path / "cut")
    train_ok(2, *options, "--max_steps", 4, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "auto")
    for name in ("model", "optimizer"):
        run, cut = (read_tensors(tmp_path / output / "checkpoint-4" / name) for output in ("run", "cut"))
        assert all(torch.equal(run[key], cut[key]) for key in run)
