"""The same curve on any topology: the cases, the measurements and the gates. `make proof` writes docs/proof.md.

It proves train.py with ddp/, fsdp/ and parallel/. Each case trains the tiny tied Qwen3 model of tests/world.py on
documents of different lengths, in fp32 and deterministic mode, with the same 16 sequences in each step. The reference
is one process that takes the global batch in one micro-step.
"""

import argparse
import dataclasses
import datetime
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import Tensor

import data.loader
import loss.next_token
from config.command_line import parse
from data.batches import IGNORE_INDEX, next_tokens
from metrics.records import read_records
from tests import world
from tests.launch import ROOT, train


@dataclass(frozen=True)
class Case:
    """One topology: its ranks, the sequences of a micro-batch, and the options that select the strategy."""

    name: str
    ranks: int
    micro_batch: int
    options: tuple[str, ...] = ()
    slow: bool = False  # only `make test-all` runs it


@dataclass(frozen=True)
class Deviation:
    """The differences between a case and the reference. For loss and gradient norm, the largest over 20 steps."""

    gradient: float  # relative L2, of the first step before clipping
    loss: float  # absolute, nats per token
    grad_norm: float  # relative
    evaluation: float  # absolute, mean loss of the first evaluation
    parameters: float  # relative L2, after 20 steps


FSDP = ("--strategy", "fsdp")
ZERO2 = (*FSDP, "--reshard_after_forward", "false")
HYBRID = (*FSDP, "--replicas", "2")
TENSOR = (*FSDP, "--tensor_parallel", "2")
CONTEXT = ("--context_parallel", "2")
BF16 = ("--bf16", "true")
SHARDED_OPTIMIZER = ("--shard_optimizer",)

REFERENCE = Case("single", 1, 16)
CASES = [
    Case("single", 1, 4),
    Case("single", 1, 2, slow=True),
    Case("DDP", 2, 8),
    Case("DDP", 2, 2, slow=True),
    Case("DDP", 4, 4, slow=True),
    Case("DDP", 4, 1, slow=True),
    Case("DDP, sharded optimizer", 1, 4, SHARDED_OPTIMIZER, slow=True),
    Case("DDP, sharded optimizer", 2, 2, SHARDED_OPTIMIZER, slow=True),
    Case("DDP, sharded optimizer", 4, 4, SHARDED_OPTIMIZER, slow=True),
    Case("DDP, sharded optimizer", 4, 1, SHARDED_OPTIMIZER, slow=True),
    Case("FSDP", 1, 4, FSDP, slow=True),
    Case("FSDP", 2, 8, FSDP),
    Case("FSDP", 2, 2, FSDP, slow=True),
    Case("FSDP", 4, 4, FSDP, slow=True),
    Case("FSDP", 4, 1, FSDP, slow=True),
    Case("FSDP (ZeRO-2)", 2, 4, ZERO2, slow=True),
    Case("FSDP (ZeRO-2)", 4, 2, ZERO2, slow=True),
    Case("hybrid FSDP 2 x 2", 4, 4, HYBRID, slow=True),
    Case("hybrid FSDP 2 x 2", 4, 1, HYBRID, slow=True),
    Case("FSDP, gradients reduce-scattered in every micro-step", 2, 2, (*FSDP, "--sync_each_batch"), slow=True),
    Case("FSDP, CPU offload", 2, 4, (*FSDP, "--cpu_offload"), slow=True),
    Case("tensor parallel", 2, 8, TENSOR),
    Case("FSDP x tensor parallel", 4, 8, TENSOR, slow=True),
    Case("FSDP x tensor parallel", 4, 2, TENSOR, slow=True),
    Case("FSDP (ZeRO-2) x tensor parallel", 4, 2, (*ZERO2, *TENSOR), slow=True),
    Case("hybrid FSDP x tensor parallel", 4, 4, (*TENSOR, "--replicas", "2"), slow=True),
    Case("FSDP x tensor parallel, activation checkpointing", 4, 4, (*TENSOR, "--gradient_checkpointing"), slow=True),
    Case("DDP x context parallel", 2, 8, CONTEXT, slow=True),
    Case("FSDP x context parallel", 2, 8, (*FSDP, *CONTEXT), slow=True),
    Case("FSDP x context parallel", 4, 2, (*FSDP, "--context_parallel", "4"), slow=True),
    Case(
        "hybrid FSDP x context parallel, activation checkpointing",
        4,
        4,
        (*HYBRID, *CONTEXT, "--gradient_checkpointing"),
        slow=True,
    ),
    Case("DDP, activation checkpointing", 2, 4, ("--gradient_checkpointing",), slow=True),
    Case(
        "FSDP, activation checkpointing and offload",
        2,
        4,
        (*FSDP, "--gradient_checkpointing", "--offload_activations"),
        slow=True,
    ),
]
EP2 = (*FSDP, "--expert_parallel", "2")
EP4 = (*FSDP, "--expert_parallel", "4")
CHECKPOINTING = ("--gradient_checkpointing",)
MIXTURE_CASES = [  # of a mixture of experts, against one process
    Case("expert parallel", 2, 8, EP2),
    Case("FSDP x expert parallel", 4, 2, EP2, slow=True),
    Case("FSDP x expert parallel", 4, 4, EP2, slow=True),
    Case("expert parallel", 4, 4, EP4, slow=True),
    Case("FSDP (ZeRO-2) x expert parallel", 4, 2, (*EP2, "--reshard_after_forward", "false"), slow=True),
    Case("FSDP x expert parallel, reduce-scattered in every micro-step", 4, 2, (*EP2, "--sync_each_batch"), slow=True),
    Case("FSDP x expert parallel, activation checkpointing", 4, 4, (*EP2, *CHECKPOINTING), slow=True),
]
BF16_CASES = [
    Case("DDP, bf16", 2, 4, BF16, slow=True),
    Case("DDP, bf16 with a bf16 residual", 2, 4, (*BF16, "--bf16_residual"), slow=True),
    Case("FSDP, bf16", 2, 4, (*FSDP, *BF16)),
    Case("FSDP, gradients reduced in bf16", 2, 4, (*FSDP, "--reduce_dtype", "bfloat16"), slow=True),
    Case("FSDP x tensor parallel, bf16", 4, 8, (*TENSOR, *BF16), slow=True),
    Case("FSDP x context parallel, bf16", 2, 8, (*FSDP, *CONTEXT, *BF16), slow=True),
]

PLOTTED = {("DDP", 4, 4), ("FSDP", 2, 8), ("FSDP x tensor parallel", 4, 8), ("FSDP x context parallel", 2, 8)}

GATES = Deviation(gradient=1e-6, loss=1e-5, grad_norm=1e-5, evaluation=1e-6, parameters=1e-5)
BF16_GRADIENT_GATE = 2e-2
PLANTED_BUG_GATE = 1e-2  # a mean of means must exceed it

ADAMW: tuple[object, ...] = ()
# AdamW with an epsilon far above every gradient and no momentum is SGD: 500 x g / (|g| + 1000) = 0.5 x g.
SGD: tuple[object, ...] = ("--adam_epsilon", 1000, "--learning_rate", 500, "--adam_beta1", 0, "--weight_decay", 0)

TEXT = """# Any topology, the same curve

{largest}
All gates hold: no difference exceeds its gate (first line of the table).

![Loss curves of five topologies on top of one another](proof.svg)

`make proof` wrote this page on {date}, with Python {python}, torch {torch} and transformers {transformers}. The ranks
are processes on a CPU, and communicate over gloo.

A tiny Qwen3 model with tied embeddings trains on documents of different lengths, 16 sequences in each step, in fp32 and
deterministic mode. The reference is one process that takes all 16 sequences in one micro-step. Each line of the table
is the same training on another topology, and shows its difference from the reference. The lines with expert parallelism
have a Qwen3 mixture of four experts, and one process with that model as their reference:

| column | difference | measured on |
|---|---|---|
| gradient | relative L2 | full gradient of the first step, before clipping |
| loss | absolute, nats per token | worst of 20 steps |
| gradient norm | relative | worst of 20 steps |
| evaluation | absolute, nats per token | first evaluation |
| parameters | relative L2 | after 20 steps |

The remaining differences come from fp32 sums in another order. AdamW hides a gradient that is wrong by a constant
factor, so each case also trains with SGD (AdamW with an epsilon far above every gradient).

{matrix}

The next table has bf16, and a bug planted in the real training loop. The bug shows how large the difference is when the
gradient is wrong.

{bf16}

`make test` checks these gates for some of the lines, and `make test-all` for all lines
([tests/test_topology.py](../tests/test_topology.py)).
"""


def marked(cases: list[Case]) -> list[Any]:
    """Parameters of a test, with the names of the cases as ids."""
    return [
        pytest.param(
            case, id=f"{case.name}-{case.ranks}x{case.micro_batch}", marks=[pytest.mark.slow] if case.slow else []
        )
        for case in cases
    ]


def curve(case: Case, options: list[object], output_dir: Path) -> Path:
    """Run 20 steps of a case."""
    _train(case, [*options, "--output_dir", output_dir])
    return output_dir


def first_gradient(case: Case, options: list[object], output_dir: Path, before: Any = None) -> dict[str, Tensor]:
    """The full gradient of a case's first step, by parameter. `before` runs first in each rank.

    The gradient comes from the checkpoint: AdamW's first moment after one step is (1 - beta1) times the gradient.
    """
    one_step = ["--max_steps", 1, "--max_grad_norm", 0, "--validation_split_percentage", 0, "--adam_beta1", 0]
    _train(case, [*options, *one_step, "--output_dir", output_dir], before)
    moments = read_tensors(output_dir / "checkpoint-1" / "optimizer")
    return {name: tensor for name, tensor in moments.items() if name.startswith("exp_avg.")}


def deviation(run: Path, reference: Path, gradient: float) -> Deviation:
    """The deviation of a run, with equal token counts, from the reference. `gradient` is that of the first gradient."""
    records, expected = read_records(run / "metrics.jsonl"), read_records(reference / "metrics.jsonl")
    for key in ("step", "tokens_seen", "eval_tokens"):
        assert [record.get(key) for record in records] == [record.get(key) for record in expected], key
    steps = [(record, other) for record, other in zip(records, expected, strict=True) if "loss" in other]
    assert len(steps) == 20
    return Deviation(
        gradient=gradient,
        loss=max(abs(record["loss"] - other["loss"]) for record, other in steps),
        grad_norm=max(abs(record["grad_norm"] / other["grad_norm"] - 1) for record, other in steps),
        evaluation=abs(records[0]["eval_loss"] - expected[0]["eval_loss"]),
        parameters=relative_l2(load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")),
    )


def relative_l2(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|actual - expected| / |expected| over all tensors together, in fp64."""
    assert actual.keys() == expected.keys()
    difference = sum(((actual[name].double() - expected[name].double()) ** 2).sum() for name in expected)
    return float((difference / sum((expected[name].double() ** 2).sum() for name in expected)) ** 0.5)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All full tensors of a folder of sharded safetensors files, read by this one process."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    described: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def mean_of_means() -> None:
    """Plant the classic bug in a rank: the loss is the mean over micro-batches of the mean over their tokens."""
    loss_sum, collate = loss.next_token.head_and_loss_sum, data.loader.collate

    def mean(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Any, labels_BT: Tensor, cross_entropy_: Any) -> Tensor:
        targets = (next_tokens(labels_BT) != IGNORE_INDEX).sum()
        return loss_sum(hidden_BTD, weight_VD, bias_V, labels_BT, cross_entropy_) / targets

    def count_micro_batches(*inputs: Any, **named: Any) -> dict[str, Tensor]:
        return collate(*inputs, **named) | {"targets": torch.tensor(1)}

    loss.next_token.head_and_loss_sum = mean
    data.loader.collate = count_micro_batches


class _References:
    """What one process measures with `options`: the first gradient, and a curve for each optimizer."""

    def __init__(self, options: list[object], directory: Path) -> None:
        self.options = options
        self.gradient = first_gradient(REFERENCE, options, directory / "gradient")
        self.curves = {
            label: curve(REFERENCE, [*options, *more], directory / label)
            for label, more in (("AdamW", ADAMW), ("SGD", SGD))
        }


def main() -> None:
    """Measure every case, print the tables, and write docs/proof.md and docs/proof.svg."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model").mkdir()
        options = world.options(
            world.make_model(directory / "model"), world.make_train_file(directory / "text.jsonl"), directory / "cache"
        )
        mixture = [*options, "--model_name_or_path", world.make_mixture(directory / "mixture", directory / "model")]
        lines = [
            "| topology | ranks | micro-batch x micro-steps | optimizer "
            "| gradient | loss | gradient norm | evaluation | parameters |",
            "|---|---|---|---|---|---|---|---|---|",
            f"| **gate** | | | | {' | '.join(f'{gate:.0e}' for gate in dataclasses.astuple(GATES))} |",
        ]
        _say(lines)
        deviations = []
        dense, of_mixture = _References(options, directory / "dense"), _References(mixture, directory / "experts")
        losses = {_label(REFERENCE): _losses(dense.curves["AdamW"])}
        pairs = [(case, dense) for case in CASES] + [(case, of_mixture) for case in MIXTURE_CASES]
        for index, (case, reference) in enumerate(pairs):
            given = reference.options
            first = relative_l2(first_gradient(case, given, directory / f"gradient-{index}"), reference.gradient)
            for label, more in (("AdamW", ADAMW), ("SGD", SGD)):
                run = curve(case, [*given, *more], directory / f"{index}-{label}")
                measured = dataclasses.astuple(deviation(run, reference.curves[label], first))
                deviations.append(measured)
                if label == "AdamW" and (case.name, case.ranks, case.micro_batch) in PLOTTED:
                    losses[_label(case)] = _losses(run)
                held = all(value <= gate for value, gate in zip(measured, dataclasses.astuple(GATES), strict=True))
                groups = case.ranks // parse([*case.options]).model_parallel_size
                shape = f"{case.ranks} | {case.micro_batch} x {16 // case.micro_batch // groups} | {label}"
                lines.append(f"| {case.name} | {shape} | {' | '.join(f'{value:.1e}' for value in measured)} |")
                _say(lines[-1:])
                assert held, "a gate is broken"
        bf16 = ["| case | first gradient against fp32 | gate |", "|---|---|---|"]
        for case in BF16_CASES:
            value = relative_l2(first_gradient(case, options, directory / case.name), dense.gradient)
            assert value <= BF16_GRADIENT_GATE, "a gate is broken"
            bf16.append(f"| {case.name}, {case.ranks} ranks | {value:.1e} | at most {BF16_GRADIENT_GATE:.0e} |")
        planted = first_gradient(Case("DDP", 2, 4), options, directory / "planted", before=mean_of_means)
        value = relative_l2(planted, dense.gradient)
        assert value > PLANTED_BUG_GATE, "the proof would not see the bug"
        bf16.append(f"| mean of means (planted bug), 2 ranks | {value:.1e} | more than {PLANTED_BUG_GATE:.0e} |")
        _say(bf16)
    text = TEXT.format(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today(),
        largest=_summary(deviations),
        matrix="\n".join(lines),
        bf16="\n".join(bf16),
    )
    (ROOT / "docs" / "proof.md").write_text(text)
    (ROOT / "docs" / "proof.svg").write_text(plot(losses))


def plot(curves: dict[str, list[float]]) -> str:
    """An SVG of the loss over steps: a curve for each label."""
    from metrics.report.plots import overlaid, to_svg  # matplotlib, which the other tests do without

    return to_svg(overlaid("proof", "The same training on five topologies", "nats per token", curves), (6.7, 3.8))


def _summary(deviations: list[tuple[float, ...]]) -> str:
    """The largest deviation in each measured quantity, in a sentence."""
    largest = Deviation(*map(max, zip(*deviations, strict=True)))
    return (
        f"Largest difference from one process in {len(deviations) // 2} cases x 2 optimizers: "
        f"gradient {largest.gradient:.1e}, "
        f"loss {largest.loss:.1e},\ngradient norm {largest.grad_norm:.1e}, evaluation {largest.evaluation:.1e}, "
        f"parameters {largest.parameters:.1e}."
    )


def _label(case: Case) -> str:
    return f"{case.name}, {case.ranks} rank{'s' if case.ranks > 1 else ''}"


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]


def _train(case: Case, options: list[object], before: Any = None) -> None:
    options = [*options, "--per_device_train_batch_size", case.micro_batch, "--full_determinism", *case.options]
    outcome = train(case.ranks, options, before)
    assert outcome.exit_codes == [0] * case.ranks, outcome.output


def _say(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stdout, flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tests.proof", description=__doc__).parse_args()  # --help trains nothing
    main()
