"""Proves estimate/ and compare/scaling.py: predicted memory and collectives are those of real ranks."""

import copy
import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, PreTrainedModel

import ddp
import fsdp
from compare import scaling
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from estimate.__main__ import main
from estimate.activations import Activations, count_activations
from estimate.communication import Collectives, predict_collectives
from estimate.memory import RESERVED, host_memory, memory_by_phase, predict, readable
from estimate.stages import advice, explain_out_of_memory, memory_forecast, stage_name, stages
from loss.next_token import NextToken, bypass_head
from model.build import build_model
from model.compile import compile_layers
from tests.families import FAMILIES, drawn, make_family
from tests.launch import ROOT, Ranks, train
from tests.test_flops import BY_HAND, SIZES

STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "DDP": (2, {}),
    "DDP, optimizer sharded (ZeRO-1)": (2, {"shard_optimizer": True}),
    "FSDP, not resharded after forward (ZeRO-2)": (2, {"strategy": "fsdp", "reshard_after_forward": False}),
    "FSDP (ZeRO-3)": (3, {"strategy": "fsdp"}),  # three ranks, which cannot divide the rows of anything
    "hybrid FSDP, 2 replicas": (4, {"strategy": "fsdp", "replicas": 2}),
}
QUICK = ("DDP", "FSDP (ZeRO-3)")


@pytest.fixture(scope="module")
def meta_model(model_dir: Path) -> PreTrainedModel:
    """The model of tests/world.py as it is before wrapping: shapes without values."""
    return build_model(Options(), AutoConfig.from_pretrained(model_dir))


def record(path: Path) -> None:
    """Let rank 0 write down the bytes that it has of parameters, gradients and optimizer after each step."""

    def local(tensor: Tensor) -> int:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return part.numel() * part.element_size()

    for strategy in (ddp, fsdp):

        def gather_parameters(optimizer: Optimizer, gather: Any = strategy.gather_parameters) -> None:
            gather(optimizer)
            parts = [part for group in optimizer.param_groups if "replicated" in group for part in group["params"]]
            assert all(part.grad is None for part in parts), "it would keep what DDP or zero_grad gives up"
            whole = [
                parameter for group in optimizer.param_groups for parameter in group.get("replicated", group["params"])
            ]
            state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
            terms = {
                "parameters": sum(map(local, whole)),
                "gradients": sum(local(parameter.grad) for parameter in whole if parameter.grad is not None),
                "optimizer": sum(map(local, state)),
            }
            if torch.distributed.get_rank() == 0:
                path.write_text(json.dumps(terms))

        strategy.gather_parameters = gather_parameters  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "each"),
    [
        *(pytest.param(name, {}, marks=[] if name in QUICK else pytest.mark.slow) for name in STAGES),
        pytest.param(
            "hybrid FSDP, 2 replicas", {"sync_each_batch": True, "reduce_dtype": "bfloat16"}, marks=pytest.mark.slow
        ),
        pytest.param("FSDP (ZeRO-3)", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("FSDP (ZeRO-3)", {"optim_state_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("DDP, optimizer sharded (ZeRO-1)", {"optim_state_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("FSDP (ZeRO-3)", {"optim": "muon"}, marks=pytest.mark.slow),
        pytest.param("DDP, optimizer sharded (ZeRO-1)", {"optim": "muon"}, marks=pytest.mark.slow),
        pytest.param("FSDP (ZeRO-3)", {"tensor_parallel": 2, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(
            "FSDP (ZeRO-3)",
            {"tensor_parallel": 2, "gradient_checkpointing": True, "torch_compile": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("FSDP, not resharded after forward (ZeRO-2)", {"tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("FSDP (ZeRO-3)", {"context_parallel": 2}, marks=pytest.mark.slow),
        ("DDP", {"context_parallel": 4, "gradient_checkpointing": True}),
    ],
    ids=[
        *STAGES,
        "each micro-step exchanged, in bf16",
        "FSDP, checkpointing",
        "FSDP, bf16 moments",
        "ZeRO-1, bf16 moments",
        "FSDP, Muon",
        "ZeRO-1, Muon",
        "2 x 2",
        "2 x 2, compiled",
        "1 x 2",
        "rows of 2",
        "rows of 4, DDP, checkpointing",
    ],
)
def test_a_stage(
    name: str, each: dict[str, Any], tiny: list[object], meta_model: PreTrainedModel, tmp_path: Path
) -> None:
    """A step of it, in two micro-steps: bytes that rank 0 has, collectives and their bytes, all to the byte."""
    check_stage(name, each, tiny, meta_model, tmp_path)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("FSDP (ZeRO-3)", {"optim": "muon"}),
        pytest.param("DDP", {}, marks=pytest.mark.slow),
        pytest.param("DDP, optimizer sharded (ZeRO-1)", {"optim": "muon"}, marks=pytest.mark.slow),
        pytest.param("hybrid FSDP, 2 replicas", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_stage_of_a_mixture(
    name: str, each: dict[str, Any], tiny: list[object], model_dir: Path, tmp_path: Path
) -> None:
    """Four experts, which three ranks cannot divide: the last has none."""
    path = make_family("qwen3 moe", tmp_path / "model", model_dir, num_experts=4)
    model = build_model(Options(), AutoConfig.from_pretrained(path))
    report = check_stage(name, each, [*tiny, "--model_name_or_path", path], model, tmp_path / "run")
    assert re.search(r"^  products of experts +[\d.]+$", report, re.MULTILINE)
    assert re.search(r"^  sorting and indexing +[\d.]+$", report, re.MULTILINE)


def check_stage(
    name: str, each: dict[str, Any], tiny: list[object], meta_model: PreTrainedModel, tmp_path: Path
) -> str:
    """Compare a run with its prediction. Returns what the run printed."""
    ranks, values = STAGES[name]
    values = values | each
    ranks += -ranks % (each.get("tensor_parallel", 1) * each.get("context_parallel", 1))
    options = Options(block_size=64, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    options = dataclasses.replace(options, bf16=False, **{"torch_compile": False, **values})
    kind = "tensor" if options.tensor_parallel > 1 else "context"
    shared = f"{kind} parallel {options.model_parallel_size} x " if options.model_parallel_size > 1 else ""
    assert stage_name(options) == shared + name
    argv = [word for option, value in values.items() for word in (f"--{option}", str(value))]
    more = ["--global_batch_size", 8 * ranks // options.model_parallel_size, "--max_steps", 4, "--logging_steps", 100]
    more += ["--trace_steps", 1, "--validation_split_percentage", 0]
    outcome = train(ranks, [*tiny, *argv, *more, "--output_dir", tmp_path], partial(record, tmp_path / "bytes.json"))
    assert outcome.exit_codes == [0] * ranks, outcome.output

    expected = memory_by_phase(meta_model, options, ranks, Activations(0, 0, 0, 0, 0))[-1]
    assert expected.phase == "in the optimizer"
    assert json.loads((tmp_path / "bytes.json").read_text()) == {
        term: getattr(expected, term) for term in ("parameters", "gradients", "optimizer")
    }

    (trace,) = re.findall(r"traced (\S+); collectives of a step:", outcome.output)
    assert json.loads(Path(trace).read_text())["traceEvents"]
    found = re.findall(r"^  (\w+) +([\d,]+) with +([\d,]+) bytes$", outcome.output, re.MULTILINE)
    counted = {kind: tuple(int(number.replace(",", "")) for number in numbers) for kind, *numbers in found}
    assert counted == predict_collectives(meta_model, options, ranks)
    return outcome.output


def saved_by(model: PreTrainedModel, options: Options) -> int:
    """The bytes that a forward pass of a micro-batch saves on the CPU, without parameters and buffers."""
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # which must live on: the next one might get its address
        return tensor

    ids_BT = torch.zeros(options.per_device_train_batch_size, options.block_size or 0, dtype=torch.int64)
    with (
        bypass_head(model.get_output_embeddings()),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=options.bf16),
    ):
        model(input_ids=ids_BT, use_cache=False)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


@pytest.mark.parametrize("more", [{"bf16": False}, {}, {"bf16_residual": True}, {"float8": True}], ids=str)
@pytest.mark.parametrize(
    ("compiled", "budget"),
    [(False, None), pytest.param(True, None, marks=pytest.mark.slow), pytest.param(True, 0.5, marks=pytest.mark.slow)],
)
def test_activations(model_dir: Path, more: dict[str, Any], compiled: bool, budget: float | None) -> None:
    """What a real forward on the CPU saves, and what is counted without values: the same, to the byte.

    Within a budget, what is kept is the solution of a knapsack of estimates: it is the same within a tenth. So it is of
    compiled layers in float8, where the choice between a tensor and what it was cast to is a close one.
    """
    options = Options(per_device_train_batch_size=3, block_size=64, torch_compile=compiled)
    options = dataclasses.replace(options, activation_memory_budget=budget, **{"bf16": True, **more})
    shape = AutoConfig.from_pretrained(model_dir)
    model = drawn(options, shape)
    if compiled:
        torch.compiler.reset()
        compile_layers(model, options, "none")
    actual = saved_by(model, options)
    kept = count_activations(build_model(options, shape), options)
    seeds = 2 * 24  # of the dropout in each layer's attention, which only a GPU's keeps
    chosen = budget or (compiled and options.float8)
    assert kept.layers + kept.outside - seeds == pytest.approx(actual, rel=0.1 if chosen else 0)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["experts", "a shared expert", "a hybrid", "no attention", "eager attention"])
def test_activations_of_other_layers(name: str, bf16: bool) -> None:
    """Experts count with the tokens that routing sends to all of them together, and layers with a state as they run."""
    options = Options(per_device_train_batch_size=3, block_size=64, torch_compile=False, bf16=bf16)
    few = {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}
    config, _, attention = BY_HAND.get(name, (GptOssConfig(**SIZES, **few), 0, 0))
    config = copy.deepcopy(config)
    torch.manual_seed(0)
    model, without_values = AutoModelForCausalLM.from_config(copy.deepcopy(config)), build_model(options, config)
    model.config._experts_implementation = without_values.config._experts_implementation
    saved, counted = saved_by(model.train(), options), count_activations(without_values, options)
    seeds = 24 * attention // (4 * 2 * 8)  # of the dropout in each layer's attention, which only a GPU's keeps
    assert counted.layers + counted.outside - seeds == saved


def test_activations_of_latent_attention() -> None:
    """Fused attention saves queries and keys, values of another head_dim, and the result."""
    config = copy.deepcopy(BY_HAND["latent attention, a dense layer"][0])
    options = Options(per_device_train_batch_size=1, block_size=64, torch_compile=False, bf16=False)
    longer = dataclasses.replace(options, block_size=128)
    model = build_model(options, config)
    assert 1.9 < count_activations(model, longer).layers / count_activations(model, options).layers < 2.01


@pytest.mark.slow
def test_activations_of_divided_layers(meta_model: PreTrainedModel) -> None:
    """Two ranks keep half of what a layer is given, and of what is in it more than half: what they gather is whole."""
    options = Options(block_size=64, bf16=False, torch_compile=True, strategy="fsdp")
    whole, part = (
        count_activations(meta_model, dataclasses.replace(options, tensor_parallel=ranks)) for ranks in (1, 2)
    )
    assert part.inputs * 2 == whole.inputs
    assert whole.layers / 2 < part.layers < whole.layers


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_logits_of_divided_layers(meta_model: PreTrainedModel, objective: Any) -> None:
    """A head and loss that are computed as one divide the vocabulary; elsewhere every rank gets all logits."""
    options = Options(block_size=64, bf16=False, torch_compile=True, strategy="fsdp", objective=objective)
    logits = [
        memory_by_phase(meta_model, dataclasses.replace(options, tensor_parallel=ranks), 4, Activations(0, 0, 0, 0, 0))[
            0
        ].logits
        for ranks in (1, 2)
    ]
    assert logits[0] == logits[1] if objective == "dpo" else logits[0] > logits[1]


def test_table(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command: more rows need more, stages that shard more need less, and what does not fit is in brackets."""
    argv = ["--config_name", str(model_dir), "--tokenizer_name", str(model_dir), "--torch_compile", "false"]
    argv += ["--block_size", "256"]
    main(argv)
    assert "parameters, 1 rank, sequences of 256 tokens" in capsys.readouterr().out
    argv += ["--ranks", "16"]
    main([*argv, "--gpu_memory", "3.03"])
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    plain, part_of_optimizer, kept, sharded, hybrid = STAGES
    offloaded = [f"{sharded}, {what} offloaded" for what in ("shards", "shards and layer inputs")]
    assert [name.strip() for name, *_ in lines[1:]] == [plain, part_of_optimizer, hybrid, kept, sharded, *offloaded]
    brackets = ["(" in cell for _, *cells in lines[1:] for cell in cells]
    assert any(brackets)
    assert not all(brackets)
    values = [[float(cell.strip(" ()")) for cell in cells] for _, *cells in lines]
    assert all(row == sorted(row) for row in values)


def test_table_of_a_mixture(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage of a mixture has a number, from its configuration alone."""
    BY_HAND["experts"][0].save_pretrained(tmp_path)
    argv = ["--config_name", str(tmp_path), "--block_size", "64", "--bf16", "false", "--torch_compile", "false"]
    with open(tmp_path / "config.json") as file:
        config = json.load(file) | {"vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main([*argv, "--tokenizer_name", str(model_dir), "--ranks", "16", "--gpu_memory", "3.03"])
    printed = capsys.readouterr().out
    assert "?" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 8
    assert printed.splitlines()[-1].startswith("DDP, micro-batch 8: predicted ")


def test_what_would_fit(meta_model: PreTrainedModel) -> None:
    """A GPU that is too small for DDP and large enough for shards: the start block says so."""
    options = Options(block_size=8, per_device_train_batch_size=1, bf16=False, torch_compile=False)
    needed = {stage_name(stage): predict(meta_model, stage, 8).total for stage in stages(options, 8)}
    smallest, least, most = min(needed, key=lambda name: needed[name]), min(needed.values()), needed["DDP"]
    assert least < most
    room = RESERVED
    assert "more than this GPU" not in memory_forecast(meta_model, options, 8, room + most)
    assert f"; use {smallest}, which fits" in memory_forecast(meta_model, options, 8, room + least)
    assert "; no stage fits; --" in memory_forecast(meta_model, options, 8, room)
    assert len(memory_forecast(meta_model, options, 8, room).splitlines()) == 2
    divided = dataclasses.replace(options, strategy="fsdp", tensor_parallel=2)
    assert [stage.replicas for stage in stages(dataclasses.replace(divided, tensor_parallel=16), 16)] == [1] * 5
    unknown = "tensor_parallel 2: no prediction without compilation; pass --torch_compile true"
    assert memory_forecast(meta_model, divided, 8, room) == unknown


def test_windows_are_not_predicted() -> None:
    """Masks for windows are not counted, and the forecast says so where transformers makes them."""
    short = Options(block_size=16, bf16=False, torch_compile=False)
    long, packed = (dataclasses.replace(short, block_size=64, packing=packing) for packing in ("concat", "documents"))
    model = build_model(short, FAMILIES["mistral"][0])
    said = [
        ", without masks of 64 x 64 in layers with a window" in memory_forecast(model, each, 1, None)
        for each in (short, long, packed)
    ]
    assert said == [False, True, False]
    assert "without masks" not in memory_forecast(build_model(short, FAMILIES["qwen3"][0]), long, 1, None)


def test_host_memory(meta_model: PreTrainedModel) -> None:
    """What offload moves there: 16 bytes for each parameter of a rank's part, and a line in the start block says it."""
    whole = 16 * sum(parameter.numel() for parameter in meta_model.parameters())
    options = Options(block_size=16, strategy="fsdp", bf16=False, torch_compile=False)
    offloaded = dataclasses.replace(options, cpu_offload=True)
    assert host_memory(meta_model, options, 4) == 0
    assert host_memory(meta_model, offloaded, 1) == whole
    assert host_memory(meta_model, offloaded, 4) == pytest.approx(whole / 4, rel=0.05)
    bf16_moments = dataclasses.replace(offloaded, optim_state_dtype="bfloat16")
    assert host_memory(meta_model, bf16_moments, 1) == whole * 12 // 16
    hybrid = dataclasses.replace(offloaded, replicas=2)
    assert host_memory(meta_model, hybrid, 4) == host_memory(meta_model, offloaded, 2)
    assert memory_forecast(meta_model, offloaded, 1, None).endswith(f"; in host memory {readable(whole)}")


@pytest.mark.parametrize(("rows", "smaller"), [(8, "--per_device_train_batch_size"), (1, "--context_parallel")])
def test_advice(meta_model: PreTrainedModel, rows: int, smaller: str) -> None:
    """Advice is sorted by the memory it saves, and saves it; for a single sequence, it is to split the sequence."""
    options = Options(block_size=256, per_device_train_batch_size=rows, bf16=False, torch_compile=False)
    lines = advice(meta_model, options, 4)
    assert {"--gradient_checkpointing", "--bf16", "--optim_state_dtype", "--strategy", smaller} <= {
        line.split()[0] for line in lines
    }
    saved = []
    for line in lines:
        words = line.split(" saves ")[0].split()
        changed = parse(["--config_name", "x", "--torch_compile", "false", "--bf16", "false", *words])
        for name in ("block_size", "per_device_train_batch_size"):
            if f"--{name}" not in words:
                setattr(changed, name, getattr(options, name))
        saved.append(predict(meta_model, options, 4).total - predict(meta_model, changed, 4).total)
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] > 0
    assert "--context_parallel" not in " ".join(advice(meta_model, options, 3)), "three ranks are no pairs"


def run_out_of_memory(of_host: bool) -> None:
    """Let every rank meet the end of its memory in a forward: of a GPU, as CUDA's allocator says it, or of the host."""
    pass  # IMPORT

    time.sleep = threading.Event().wait  # type: ignore[assignment]  # all of it, which tests/launch.py would shorten

    def forward(*args: object, **kwargs: object) -> None:
        if of_host:
            torch.empty(2**50)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    NextToken.forward = forward  # type: ignore[method-assign,assignment]


@pytest.mark.slow
@pytest.mark.parametrize("of_host", [False, True])
def test_out_of_memory(tiny: list[object], tmp_path: Path, of_host: bool) -> None:
    """It is said once for all ranks, without a traceback, with three options."""

    def like_torchrun(ranks: Ranks) -> None:
        ranks[0].join()
        ranks[1].kill()

    options = [*tiny, "--output_dir", tmp_path, "--per_device_train_batch_size", 8]
    options += ["--strategy", "fsdp", "--cpu_offload"] if of_host else []
    outcome = train(2, options, before=partial(run_out_of_memory, of_host), meanwhile=like_torchrun)
    assert outcome.exit_codes == [1, -signal.SIGKILL], outcome.output
    said = outcome.output[outcome.output.index("train.py: out of memory") :]
    assert outcome.output.count("out of memory: ") == 1
    assert "Traceback" not in outcome.output
    assert ("predicted for FSDP (ZeRO-3), shards offloaded: " if of_host else "predicted for DDP: ") in said
    assert bool(re.search(r"^host memory: [\d.]+ MiB for each rank; a save copies", said, re.M)) == of_host
    assert re.search(
        r"^for each stage: DDP [\d.]+ MiB; DDP, optimizer sharded .* layer inputs offloaded [\d.]+ MiB$", said, re.M
    )
    assert len(re.findall(r"^--.* saves [\d.]+ MiB$", said, re.MULTILINE)) == 3


@pytest.mark.parametrize("full_disk", [False, True])
def test_memory_snapshot(full_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of GPU memory writes a file of each rank, and says where. A link in its place is replaced, not followed."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "memory" / "rank-3.pickle").symlink_to(tmp_path / "victim")

    def dump(path: str) -> None:
        if full_disk:
            raise OSError(28, "No space left on device")
        Path(path).write_text("snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    argv = ["--memory_snapshot", "--output_dir", str(tmp_path)]
    said = explain_out_of_memory(argv, torch.OutOfMemoryError("CUDA out of memory."))
    path = tmp_path / "memory" / "rank-3.pickle"
    if full_disk:
        assert f"memory snapshot: {path} cannot be written: [Errno 28]" in said
    else:
        assert f"memory snapshot: {path}, for https://pytorch.org/memory_viz" in said
        assert path.read_text() == "snapshot"
    assert (tmp_path / "victim").read_text() == "mine"
    assert "snapshot" not in explain_out_of_memory(argv[1:], torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(OptionError, match="memory_snapshot true: it records the memory of a GPU, and none is here"):
        check(parse(argv), world_size=1)


def test_a_model_that_does_not_run_without_values(meta_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run continues without the prediction."""
    monkeypatch.setattr(type(meta_model), "forward", lambda *args, **kwargs: 1 / 0)
    text = memory_forecast(meta_model, Options(block_size=8, torch_compile=False), 1, None)
    assert "no memory prediction, because it does not run on tensors without values" in text


def test_scaling(meta_model: PreTrainedModel) -> None:
    """By hand: a ring in one node, a ring through two nodes, and one of eight rings that share a node's link."""
    machine = scaling.Machine(flops=1e12, within_node=300.0, between_nodes=160.0, latency=0.0, overlap=0.5)
    options = Options(block_size=64, strategy="fsdp", torch_compile=False)
    hybrid = Options(block_size=64, strategy="fsdp", replicas=8, torch_compile=False)
    gathered = Collectives(calls=3, size=800)
    assert scaling.traffic("all_gather", gathered, options, 8) == 700
    assert scaling.traffic("all_reduce", gathered, options, 8) == 1400
    assert scaling.traffic("all_gather", gathered, hybrid, 64) == 700
    places = (("all_gather", options, 8), ("all_gather", options, 16), ("all_gather", hybrid, 64))
    assert [scaling.link(*place, machine) for place in places] == [300, 160, 300]
    assert scaling.link("all_reduce", hybrid, 64, machine) == 20
    *_, matrix, exchange, step, speed = scaling.row(meta_model, options, 8, 1e12, machine).strip("| ").split(" | ")
    collectives = predict_collectives(meta_model, options, 8)
    sent = 7 / 8 * sum(one.size * (1 + (kind == "all_reduce")) for kind, one in collectives.items())
    assert float(matrix) == 1
    assert float(exchange) == pytest.approx(sent / 300, rel=1e-5)
    assert float(step) == pytest.approx(float(exchange))  # half of it might overlap, but a second is all there is
    assert float(speed.replace(",", "")) == pytest.approx(8 * 8 * 64 / float(step), abs=0.5)


@pytest.mark.slow
def test_the_commands_run() -> None:
    """The commands of docs/scaling.md that need no model and no GPU print the tables of that page."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    for line in re.findall(r"^(python -m compare.*)$", page, re.MULTILINE):
        run = subprocess.run([sys.executable, *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        printed = [row for row in run.stdout.splitlines() if row.startswith("| ")]
        assert len(printed) > 30
        assert [row for row in printed if row not in page] == []
