"""Experts that are split among ranks compute what all experts on each rank compute."""

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    JetMoeConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import fsdp
from checkpoint.export import export_model
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from data import ledger
from estimate.activations import Activations
from estimate.communication import predict_collectives
from estimate.memory import memory_by_phase
from loss.next_token import NextToken
from model.adapt import adapt_model
from model.build import build_model, load_config_and_tokenizer
from model.layers import decoder_layers
from model.weights import find_weights, load_weights
from tests import proof, world
from tests.families import SIZES
from tests.launch import train, train_ok
from tests.proof import (
    CHECKPOINTING,
    EP2,
    GATES,
    MIXTURE_CASES,
    REFERENCE,
    Case,
    curve,
    deviation,
    first_gradient,
    relative_l2,
)
from tests.test_models import everything, same, stored
from tests.test_resume import cut_off_at, equal_to_the_bit, save_again
from tests.test_tensor_parallel import count_reads


@pytest.fixture(scope="module")
def mixture(tiny: list[object], model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The options of most runs, with a mixture of 4 experts."""
    model = world.make_mixture(tmp_path_factory.mktemp("mixture") / "model", model_dir)
    return [*tiny, "--model_name_or_path", model]


@pytest.fixture(scope="module")
def expected(mixture: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: its first gradient, and its curve."""
    directory = tmp_path_factory.mktemp("expected")
    torch.save(first_gradient(REFERENCE, mixture, directory / "gradient"), directory / "gradient.pt")
    curve(REFERENCE, [*mixture, *proof.ADAMW], directory / "AdamW")
    return directory


@pytest.mark.parametrize("case", proof.marked(MIXTURE_CASES))
def test_same_curve(expected: Path, mixture: list[object], tmp_path: Path, case: Case) -> None:
    """First gradient, 20 steps, evaluation, and the exported experts, which are whole again."""
    gradient = relative_l2(first_gradient(case, mixture, tmp_path / "gradient"), torch.load(expected / "gradient.pt"))
    assert gradient <= GATES.gradient
    measured = vars(deviation(curve(case, mixture, tmp_path / "curve"), expected / "AdamW", gradient))
    assert not {name: value for name, value in measured.items() if value > vars(GATES)[name]}


# Families by what their experts are: gated; with biases, transposed and interleaved; beside shared experts and behind a
# router with a bias; and a router that sends all tokens to one expert, so that three of four ranks receive none.
UNTIED = SIZES | {"vocab_size": 384, "tie_word_embeddings": False}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen3 moe": Qwen3MoeConfig(**UNTIED, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2),
    "gpt oss": GptOssConfig(**UNTIED, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "deepseek v3": DeepseekV3Config(
        **UNTIED | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "all to one expert": Qwen3MoeConfig(**UNTIED, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=1),
}


@pytest.fixture(scope="module")
def findings(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What 2 x 2 ranks measured for each family: load, one gradient, export."""
    directory = tmp_path_factory.mktemp("families")
    paths = {name: world.make_family(config, directory / name, model_dir) for name, config in FAMILIES.items()}
    outcome = train(4, [], before=partial(try_all, paths, directory))
    assert outcome.exit_codes == [0] * 4, outcome.output
    found: dict[str, Any] = json.loads((directory / "findings.json").read_text())
    return found


def try_all(paths: dict[str, Path], directory: Path) -> None:
    """Instead of train.py."""
    dist.init_process_group("gloo")
    found = {name: try_one(path, directory / f"{name} exported") for name, path in paths.items()}
    if dist.get_rank() == 0:
        (directory / "findings.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def try_one(path: Path, output_dir: Path) -> dict[str, Any]:
    options = Options(model_name_or_path=str(path), expert_parallel=2, output_dir=str(output_dir), save_dtype="float32")
    config, tokenizer = load_config_and_tokenizer(options)
    built = build_model(options, config)
    weights = find_weights(options, built)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if "one expert" in path.name:
        for layer in reference.model.layers:
            layer.mlp.gate.weight.data.zero_()
    wrapped = wrap(NextToken(built), options)
    read = count_reads()
    load_weights(built, weights)
    experts = [tensor for name, tensor in built.named_parameters() if ".experts." in name]
    different = same(everything(built), everything(reference))
    if "one expert" in path.name:
        for layer in built.model.layers:
            layer.mlp.gate.weight.to_local().detach().zero_()
        different = []

    rank = dist.get_rank()
    batches = [torch.arange(99).view(3, 33) * 3 % 384 + offset for offset in range(4)]
    loss = wrapped(input_ids=batches[rank], labels=batches[rank])
    loss.backward()
    norm = fsdp.grad_norm(wrapped)
    gradient = {name: full(parameter.grad) for name, parameter in built.named_parameters()}
    losses = [NextToken(reference)(input_ids=batch, labels=batch) for batch in batches]
    (torch.stack(losses).sum() / 4).backward()  # type: ignore[no-untyped-call]
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected_norm = torch.nn.utils.get_total_norm(list(expected.values()))

    output_dir.mkdir(exist_ok=True)
    export_model(options, built, tokenizer, [])
    return {
        "different": different,
        "read": read[0] / sum(tensor.numel() for tensor in everything(reference).values()),
        "owned": sum(local(tensor).numel() for tensor in experts) / sum(tensor.numel() for tensor in experts),
        "loss": abs(loss.item() / losses[rank].item() - 1),
        "gradient": relative_l2(gradient, expected),
        "worst": max(relative_l2({"": gradient[name]}, {"": expected[name]}) for name in expected),
        "norm": abs(norm.item() / expected_norm.item() - 1),
        "exported": [] if "one expert" in path.name else same(stored(output_dir), stored(path)),
    }


def wrap(objective: NextToken, options: Options) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (1, 4, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    adapt_model(objective, options, "none", mesh)
    return fsdp.wrap(objective, decoder_layers(objective.model), mesh, torch.device("cpu"), False, True, False)


def local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def full(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


@pytest.mark.parametrize("name", FAMILIES)
def test_family(findings: dict[str, Any], name: str) -> None:
    """Loss, gradient and files of what experts can be."""
    found = findings[name]
    assert found["different"] == found["exported"] == []
    assert found["loss"] < 1e-6
    assert found["norm"] < GATES.grad_norm
    assert found["gradient"] < GATES.gradient
    assert found["worst"] < 1e-5, "the tensor with the largest difference"
    assert found["owned"] < 0.34, "a quarter of the experts, or of 3 of a rank's group: 2 and 1"


ONCE = ("--logging_steps", "5", "--warmup_steps", "0", "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def split_in_two(mixture: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on 2 ranks that split the experts, with a checkpoint in the middle."""
    output_dir = tmp_path_factory.mktemp("split")
    train_ok(2, *mixture, *ONCE, *EP2, "--save_steps", 10, "--output_dir", output_dir)
    return output_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (1, "ddp"),
        (2, "ddp"),
        (4, "fsdp"),
        (4, "fsdp --expert_parallel 2"),
        (4, "fsdp --expert_parallel 4"),
    ],
)
def test_resumes_on_any_topology(
    mixture: list[object], split_in_two: Path, tmp_path: Path, ranks: int, strategy: str
) -> None:
    """The loaded state is the saved one to the bit, the rest of the run the same, and so it is on the way back."""
    resumed, again = tmp_path / "resumed", tmp_path / "again"
    cut_off_at(10, split_in_two, resumed)
    options = [*mixture, *ONCE, "--output_dir", resumed, "--resume_from_checkpoint", "auto", "--save_steps", 15]
    outcome = train(
        ranks, [*options, "--strategy", *strategy.split(), "--max_steps", 15], before=partial(save_again, again)
    )
    assert outcome.exit_codes == [0] * ranks, outcome.output
    assert equal_to_the_bit(again / "checkpoint-10", split_in_two / "checkpoint-10")
    train_ok(2, *options, *EP2)
    actual, expected = (load_file(run / "model.safetensors") for run in (resumed, split_in_two))
    assert relative_l2(actual, expected) < GATES.parameters


@pytest.mark.slow
def test_preferences(mixture: list[object], dpo: list[object], tmp_path: Path) -> None:
    """DPO evaluates the initial model without gradients, with the same all-to-alls."""
    options = [*dpo, "--model_name_or_path", mixture[-1], "--max_steps", 4]
    train_ok(1, *options, "--output_dir", tmp_path / "one")
    train_ok(4, *options, *EP2, "--output_dir", tmp_path / "four")
    one, four = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "four"))
    assert relative_l2(four, one) < GATES.parameters


@pytest.mark.slow
def test_random_weights_documents_and_the_ledger(model_dir: Path, mixture: list[object], tmp_path: Path) -> None:
    """Random weights, packed documents and sequences of a step are those of one process."""
    model = mixture[-1]
    assert isinstance(model, Path)
    named = mixture.index("--model_name_or_path")
    options = [*mixture[:named], *mixture[named + 2 : -2], "--config_name", model, "--tokenizer_name", model]
    options += ["--packing", "documents", "--ledger", "--max_steps", 4]
    train_ok(1, *options, "--output_dir", tmp_path / "one")
    train_ok(4, *options, *EP2, "--output_dir", tmp_path / "four")
    assert ledger.main([str(tmp_path / "one"), str(tmp_path / "four")]) == 0
    one, four = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "four"))
    assert relative_l2(four, one) < GATES.parameters


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), CHECKPOINTING], ids=str)
def test_compiled(mixture: list[object], tmp_path: Path, more: tuple[str, ...]) -> None:
    """A compiled layer with split experts computes what an eager one does."""
    steps = ("--max_steps", 4, *more)
    train_ok(1, *mixture, *steps, "--output_dir", tmp_path / "one")
    train_ok(2, *mixture, *steps, *EP2, "--torch_compile", "true", "--output_dir", tmp_path / "two")
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert relative_l2(two, one) < GATES.parameters


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--torch_compile", "true")], ids=str)
def test_bf16(expected: Path, mixture: list[object], tmp_path: Path, more: tuple[str, ...]) -> None:
    case = Case("FSDP x expert parallel, bf16", 4, 4, (*EP2, *proof.BF16, *more))
    gradient = first_gradient(case, mixture, tmp_path / "gradient")
    assert relative_l2(gradient, torch.load(expected / "gradient.pt")) < proof.BF16_GRADIENT_GATE


@pytest.mark.parametrize(
    ("argv", "ranks", "message"),
    [
        ("--expert_parallel 2", 2, "ddp has the full model"),
        ("--strategy fsdp --expert_parallel 3", 4, "4 ranks are 1.33 groups of 3"),
        ("--strategy fsdp --expert_parallel 2 --tensor_parallel 2", 4, "combined with tensor_parallel 2"),
        ("--strategy fsdp --expert_parallel 2 --context_parallel 2", 4, "combined with context_parallel 2"),
        ("--strategy fsdp --expert_parallel 2 --replicas 2", 4, "combined with replicas 2"),
        ("--strategy fsdp --expert_parallel 2 --cpu_offload", 4, "combined with cpu_offload true"),
        ("--strategy fsdp --expert_parallel 2 --optim muon", 4, "Muon needs the full matrices"),
    ],
)
def test_refused_options(argv: str, ranks: int, message: str) -> None:
    with pytest.raises(OptionError) as error:
        check(parse(argv.split()), ranks)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FAMILIES["gpt oss"], "gpt_oss has 4 experts in a layer, and 4 / 3 = 1.33333\npass a divisor of 4"),
        (Qwen3Config(**UNTIED), "qwen3 has no experts that follow the experts interface"),
        (JetMoeConfig(vocab_size=384, hidden_size=32, num_hidden_layers=1), "jetmoe has no experts that follow"),
    ],
    ids=["3 ranks", "dense", "experts of another kind"],
)
def test_models_that_cannot_be_split(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(OptionError) as error:
        build_model(Options(expert_parallel=3), config)
    assert f"expert_parallel 3: {message}" in str(error.value)


@pytest.mark.slow
def test_collectives_and_memory(mixture: list[object], tmp_path: Path) -> None:
    """A step of 2 x 2 ranks in two micro-steps: its collectives to the byte, all-to-alls to the balance of experts."""
    options = Options(block_size=64, per_device_train_batch_size=4, gradient_accumulation_steps=2, strategy="fsdp")
    options = dataclasses.replace(options, bf16=False, torch_compile=False, expert_parallel=2)
    more = ["--global_batch_size", 32, "--max_steps", 4, "--logging_steps", 100, "--trace_steps", 1]
    more += ["--validation_split_percentage", 0]
    printed = train_ok(4, *mixture, *EP2, *more, "--gradient_checkpointing", "--output_dir", tmp_path)
    found = re.findall(r"^  (\w+) +([\d,]+) with +([\d,]+) bytes$", printed, re.MULTILINE)
    counted = {kind: tuple(int(number.replace(",", "")) for number in numbers) for kind, *numbers in found}
    options.gradient_checkpointing = True
    model = build_model(options, AutoConfig.from_pretrained(str(mixture[-1])))
    predicted = predict_collectives(model, options, 4)
    assert {kind: calls for kind, (calls, _) in counted.items()} == {kind: one.calls for kind, one in predicted.items()}
    assert counted.pop("all_to_all")[1] == pytest.approx(predicted.pop("all_to_all").size, rel=0.3)
    assert counted == predicted

    saved = Activations(0, 0, 0, 0, 0)
    split, alone = (
        memory_by_phase(model, dataclasses.replace(options, expert_parallel=ranks), 4, saved)[0] for ranks in (2, 1)
    )
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert split.parameters == alone.parameters
    assert alone.gradients - split.gradients == 4 * experts // 2, "full gradients between micro-steps"
