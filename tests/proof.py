"""The same curve on any topology: what is measured, and the gates. `make proof` prints and writes the table.

Each case trains the tiny tied Qwen3 model of tests/world.py, on ragged documents, in fp32 and deterministic mode, with
the same 16 rows a step, and is compared with one process that takes the whole global batch at once.
"""

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
from data.sequences import Sequence
from metrics.records import read_records
from tests import world
from tests.launch import ROOT, train


@dataclass(frozen=True)
class Case:
    """One topology: ranks, rows of a micro-batch, and the options that name the strategy."""

    name: str
    ranks: int
    micro_batch: int
    options: tuple[str, ...] = ()
    slow: bool = False  # for `make test-all` alone


@dataclass(frozen=True)
class Deviation:
    """How far a case is from one process; of losses and norms the largest difference over 20 steps."""

    gradient: float  # of the first step, unclipped: relative L2
    loss: float  # absolute
    grad_norm: float  # relative
    evaluation: float  # mean loss of the initial evaluation, absolute; the token counts must be equal
    parameters: float  # after 20 steps: relative L2


FSDP = ("--strategy", "fsdp")
WHOLE = (*FSDP, "--reshard_after_forward", "false")
HYBRID = (*FSDP, "--replicas", "2")
TENSOR = (*FSDP, "--tensor_parallel", "2")
ROWS = ("--context_parallel", "2")
BF16 = ("--bf16", "true")
SHARDED_OPTIMIZER = ("--shard_optimizer",)

REFERENCE = Case("single", 1, 16)
CASES = [
    Case("single", 1, 4),
    Case("single", 1, 2, slow=True),
    Case("DDP", 2, 8),
    Case("DDP", 2, 2),
    Case("DDP", 4, 4),
    Case("DDP", 4, 1, slow=True),
    Case("DDP, sharded optimizer", 1, 4, SHARDED_OPTIMIZER, slow=True),
    Case("DDP, sharded optimizer", 2, 2, SHARDED_OPTIMIZER),
    Case("DDP, sharded optimizer", 4, 4, SHARDED_OPTIMIZER, slow=True),
    Case("DDP, sharded optimizer", 4, 1, SHARDED_OPTIMIZER, slow=True),
    Case("FSDP", 1, 4, FSDP, slow=True),
    Case("FSDP", 2, 8, FSDP),
    Case("FSDP", 2, 2, FSDP, slow=True),
    Case("FSDP", 4, 4, FSDP, slow=True),
    Case("FSDP", 4, 1, FSDP, slow=True),
    Case("FSDP, not resharded", 2, 4, WHOLE, slow=True),
    Case("FSDP, not resharded", 4, 2, WHOLE, slow=True),
    Case("FSDP, hybrid 2 x 2", 4, 4, HYBRID),
    Case("FSDP, hybrid 2 x 2", 4, 1, HYBRID, slow=True),
    Case("FSDP, each micro-step exchanged", 2, 2, (*FSDP, "--sync_each_batch"), slow=True),
    Case("FSDP, offloaded to the CPU", 2, 4, (*FSDP, "--cpu_offload")),
    Case("tensor parallel", 2, 8, TENSOR, slow=True),
    Case("FSDP x tensor parallel", 4, 8, TENSOR),
    Case("FSDP x tensor parallel", 4, 2, TENSOR, slow=True),
    Case("FSDP, not resharded, x tensor parallel", 4, 2, (*WHOLE, *TENSOR), slow=True),
    Case("hybrid x tensor parallel", 4, 4, (*TENSOR, "--replicas", "2"), slow=True),
    Case("FSDP x tensor parallel, checkpointing", 4, 4, (*TENSOR, "--gradient_checkpointing"), slow=True),
    Case("DDP, rows divided", 2, 8, ROWS, slow=True),
    Case("FSDP, rows divided", 2, 8, (*FSDP, *ROWS)),
    Case("FSDP, rows divided", 4, 2, (*FSDP, "--context_parallel", "4"), slow=True),
    Case("hybrid, rows divided, checkpointing", 4, 4, (*HYBRID, *ROWS, "--gradient_checkpointing"), slow=True),
    Case("DDP, checkpointing", 2, 4, ("--gradient_checkpointing",), slow=True),
    Case("FSDP, checkpointing", 2, 4, (*FSDP, "--gradient_checkpointing", "--offload_activations")),
]
BF16_CASES = [
    Case("DDP, bf16", 2, 4, BF16),
    Case("DDP, bf16, the residual too", 2, 4, (*BF16, "--bf16_residual")),
    Case("FSDP, bf16", 2, 4, (*FSDP, *BF16)),
    Case("FSDP, reduced in bf16", 2, 4, (*FSDP, "--reduce_dtype", "bfloat16"), slow=True),
    Case("FSDP x tensor parallel, bf16", 4, 8, (*TENSOR, *BF16), slow=True),
    Case("FSDP, rows divided, bf16", 2, 8, (*FSDP, *ROWS, *BF16), slow=True),
]

GATES = Deviation(gradient=1e-6, loss=1e-5, grad_norm=1e-5, evaluation=1e-6, parameters=1e-5)
BF16_GRADIENT_GATE = 2e-2
PLANTED_BUG_GATE = 1e-2  # what a mean of means must exceed


def marked(cases: list[Case]) -> list[Any]:
    """Cases as parameters of a test, by name."""
    return [
        pytest.param(
            case, id=f"{case.name}-{case.ranks}x{case.micro_batch}", marks=[pytest.mark.slow] if case.slow else []
        )
        for case in cases
    ]


ADAMW: tuple[object, ...] = ()
# AdamW with an epsilon far above every gradient and no momentum is SGD: 500 x g / (|g| + 1000) = 0.5 x g.
SGD: tuple[object, ...] = ("--adam_epsilon", 1000, "--learning_rate", 500, "--adam_beta1", 0, "--weight_decay", 0)


def curve(case: Case, options: list[object], output_dir: Path) -> Path:
    """Run 20 steps of a case."""
    _train(case, [*options, "--output_dir", output_dir])
    return output_dir


def first_gradient(case: Case, options: list[object], output_dir: Path, before: Any = None) -> dict[str, Tensor]:
    """The whole gradient of a case's first step, by parameter.

    It is read from the checkpoint: AdamW's first moment after one step is (1 - beta1) times the gradient.
    """
    one_step = ["--max_steps", 1, "--max_grad_norm", 0, "--validation_split_percentage", 0, "--adam_beta1", 0]
    _train(case, [*options, *one_step, "--output_dir", output_dir], before)
    moments = read_tensors(output_dir / "checkpoint-1" / "optimizer")
    return {name: tensor for name, tensor in moments.items() if name.startswith("exp_avg.")}


def deviation(run: Path, reference: Path, gradient: float) -> Deviation:
    """The largest deviations of a run from the reference, beside that of its first gradient."""
    rows, expected = read_records(run / "metrics.jsonl"), read_records(reference / "metrics.jsonl")
    for key in ("step", "tokens_seen", "eval_tokens"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in expected], key
    steps = [(row, other) for row, other in zip(rows, expected, strict=True) if "loss" in other]
    assert len(steps) == 20
    return Deviation(
        gradient=gradient,
        loss=max(abs(row["loss"] - other["loss"]) for row, other in steps),
        grad_norm=max(abs(row["grad_norm"] / other["grad_norm"] - 1) for row, other in steps),
        evaluation=abs(rows[0]["eval_loss"] - expected[0]["eval_loss"]),
        parameters=relative_l2(load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")),
    )


def relative_l2(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|actual - expected| / |expected| over all tensors together, in fp64."""
    assert actual.keys() == expected.keys()
    difference = sum(((actual[name].double() - expected[name].double()) ** 2).sum() for name in expected)
    return float((difference / sum((expected[name].double() ** 2).sum() for name in expected)) ** 0.5)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a sharded safetensors folder, whole, in this one process."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    described: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def mean_of_means() -> None:
    """Plant the classic bug in a rank: each micro-batch's own mean, then the mean of those."""
    loss_sum, collate = loss.next_token.head_and_loss_sum, data.loader.collate

    def mean(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Any, labels_BT: Tensor, cross_entropy_: Any) -> Tensor:
        targets = (next_tokens(labels_BT) != IGNORE_INDEX).sum()
        return loss_sum(hidden_BTD, weight_VD, bias_V, labels_BT, cross_entropy_) / targets

    def count_micro_batches(sequences: list[Sequence], padded_length: int | None = None) -> dict[str, Tensor]:
        return collate(sequences, padded_length) | {"targets": torch.tensor(1)}

    loss.next_token.head_and_loss_sum = mean
    data.loader.collate = count_micro_batches


def main() -> None:
    """Measure every case, print the table and write it to docs/proof.md."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model").mkdir()
        options = world.options(
            world.make_model(directory / "model"), world.make_train_file(directory / "text.jsonl"), directory / "cache"
        )
        gradient = first_gradient(REFERENCE, options, directory / "reference-gradient")
        references = {
            label: curve(REFERENCE, [*options, *more], directory / f"reference-{label}")
            for label, more in (("AdamW", ADAMW), ("SGD", SGD))
        }
        lines = [
            "| | ranks | micro-batch x steps | optimizer | gradient | loss | gradient norm | evaluation | parameters |",
            "|---|---|---|---|---|---|---|---|---|",
            f"| **gate** | | | | {' | '.join(f'{gate:.0e}' for gate in dataclasses.astuple(GATES))} |",
        ]
        _say(lines)
        for index, case in enumerate(CASES):
            first = relative_l2(first_gradient(case, options, directory / f"gradient-{index}"), gradient)
            for label, more in (("AdamW", ADAMW), ("SGD", SGD)):
                run = curve(case, [*options, *more], directory / f"{index}-{label}")
                measured = dataclasses.astuple(deviation(run, references[label], first))
                held = all(value <= gate for value, gate in zip(measured, dataclasses.astuple(GATES), strict=True))
                readers = case.ranks // parse([*case.options]).model_parallel_size
                shape = f"{case.ranks} | {case.micro_batch} x {16 // case.micro_batch // readers} | {label}"
                lines.append(f"| {case.name} | {shape} | {' | '.join(f'{value:.1e}' for value in measured)} |")
                _say(lines[-1:])
                assert held, "a gate is broken"
        bf16 = ["| | first gradient against fp32 | |", "|---|---|---|"]
        for case in BF16_CASES:
            value = relative_l2(first_gradient(case, options, directory / case.name), gradient)
            assert value <= BF16_GRADIENT_GATE, "a gate is broken"
            bf16.append(f"| {case.name}, {case.ranks} ranks | {value:.1e} | gate: at most {BF16_GRADIENT_GATE:.0e} |")
        planted = first_gradient(Case("DDP", 2, 4), options, directory / "planted", before=mean_of_means)
        value = relative_l2(planted, gradient)
        assert value > PLANTED_BUG_GATE, "the proof would not see the bug"
        bf16.append(f"| mean of means, a planted bug | {value:.1e} | must exceed {PLANTED_BUG_GATE:.0e} |")
        _say(bf16)
    text = TEXT.format(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today(),
        matrix="\n".join(lines),
        bf16="\n".join(bf16),
    )
    (ROOT / "docs" / "proof.md").write_text(text)


TEXT = """# Any topology, the same curve

`make proof` wrote this page: {date}, Python {python}, torch {torch}, transformers {transformers}, processes over gloo
on a CPU.

A tiny Qwen3 model with tied embeddings learns from ragged documents, 16 rows a step, in fp32 and deterministic mode.
The reference is one process that takes the 16 rows at once. Every line below is the same job on other ranks, with
another strategy, or in other micro-steps, and how far it is from the reference: the whole gradient of the first step
before clipping (relative L2), the loss of the worst of 20 steps (absolute), its gradient norm (relative), the initial
evaluation (absolute), and the parameters after 20 steps (relative L2). What remains is the rounding of fp32 sums in
another order. AdamW hides a gradient that is wrong by a factor; SGD (here the limit of AdamW for an epsilon far above
every gradient) does not.

{matrix}

In bf16, and with a bug planted in the real loop so that one sees what a broken line would look like:

{bf16}

`make test` holds the same gates for a part of these lines, `make test-all` for all (`tests/test_topology.py`).
"""


def _train(case: Case, options: list[object], before: Any = None) -> None:
    options = [*options, "--per_device_train_batch_size", case.micro_batch, "--full_determinism", *case.options]
    outcome = train(case.ranks, options, before)
    assert outcome.exit_codes == [0] * case.ranks, outcome.output


def _say(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
