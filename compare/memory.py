"""The memory that estimate/memory.py predicts and that a GPU then allocates: Qwen3 shapes, 4096 tokens or more, bf16.

    python -m compare.memory [--cases 0,3,8]

Each case trains four steps in its own process: alone, or as one rank of a fake process group, whose collectives do
nothing. Prints the predicted peak, the peak of the last two steps (`torch.cuda.max_memory_allocated`), and their ratio;
without a GPU, only the prediction.
"""

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from compare.bench import ON_GPU, SHAPES
from compare.sharded import build, configuration
from config.errors import first_line
from config.options import Options
from estimate.memory import GIB, Memory, predict
from estimate.stages import stage_name
from model.build import build_model

# Processes are forked from a server that has imported torch, and has no CUDA context, which would not outlive that.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["compare.sharded"])
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
LENGTH = 4096
QWEN3_32B = {**SHAPES["8B"], "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64}
QWEN3_32B["num_attention_heads"] = 64
# Mixtures: Qwen3-30B-A3B with 3 of its 48 layers, and a smaller one with as many experts for each token.
A3B: dict[str, Any] = {**SHAPES["8B"], "hidden_size": 2048, "num_hidden_layers": 3, "intermediate_size": 6144}
A3B |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
A3B |= {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
SMALL_MIXTURE = {**A3B, "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_experts": 32}
MODELS = {**SHAPES, "32B": QWEN3_32B, "30B-A3B-3-layers": A3B, "mixture of 32": SMALL_MIXTURE}
MODELS["30B-A3B"] = {**A3B, "num_hidden_layers": 48}
FSDP: dict[str, Any] = {"strategy": "fsdp"}
CHECKPOINTED: dict[str, Any] = {**FSDP, "gradient_checkpointing": True}

ADAPTERS: dict[str, Any] = {"use_peft": True, "lora_dropout": 0.0}

# Options that a case is called by.
NAMED = (
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "sync_each_batch",
    "activation_memory_budget",
    "optim",
    "float8",
    "use_peft",
    "lora_dropout",
)


class Case(NamedTuple):
    """A model, the number of ranks, sequences of a micro-batch, and other options."""

    model: str
    ranks: int
    sequences: int
    others: dict[str, Any]

    @property
    def options(self) -> Options:
        defaults: dict[str, Any] = {"block_size": LENGTH, "bf16": True, "torch_compile": True}
        return Options(per_device_train_batch_size=self.sequences, **{**defaults, **self.others})

    def __str__(self) -> str:
        others: list[str] = [name for name in NAMED if name in self.others]
        others += [] if self.options.torch_compile else ["not compiled"]
        others += [f"sequences of {self.options.block_size:,}"] if self.options.block_size != LENGTH else []
        return ", ".join([stage_name(self.options), *others]).replace("_", " ")


CASES = [
    Case("0.6B", 1, 4, {}),
    Case("0.6B", 1, 8, {}),
    Case("0.6B", 1, 4, {"torch_compile": False}),
    Case("0.6B", 1, 4, {"gradient_checkpointing": True}),
    Case("0.6B", 1, 4, {"gradient_accumulation_steps": 2}),
    Case("0.6B", 1, 4, FSDP),
    Case("1.7B", 1, 4, {}),
    Case("0.6B", 8, 4, {}),
    Case("0.6B", 8, 4, {"shard_optimizer": True}),
    Case("0.6B", 64, 1, {}),
    Case("0.6B", 64, 4, {**FSDP, "torch_compile": False}),
    Case("1.7B", 8, 4, {**FSDP, "reshard_after_forward": False}),
    Case("8B", 8, 4, FSDP),
    Case("8B", 8, 4, CHECKPOINTED),
    Case("8B", 64, 4, CHECKPOINTED),
    Case("8B", 64, 1, {**CHECKPOINTED, "gradient_accumulation_steps": 2}),
    Case("8B", 64, 2, {**CHECKPOINTED, "replicas": 8}),
    Case("32B", 64, 1, CHECKPOINTED),
    Case("32B", 64, 1, {**CHECKPOINTED, "replicas": 8}),
    Case("8B", 8, 4, {**CHECKPOINTED, "gradient_accumulation_steps": 2}),
    Case("8B", 8, 4, {**CHECKPOINTED, "gradient_accumulation_steps": 2, "sync_each_batch": True}),
    Case("8B", 8, 4, {**CHECKPOINTED, "cpu_offload": True}),
    Case("8B", 8, 4, {**CHECKPOINTED, "offload_activations": True}),
    Case("8B", 8, 4, {**CHECKPOINTED, "cpu_offload": True, "offload_activations": True}),
    Case("8B", 8, 4, {**CHECKPOINTED, "reshard_after_forward": False}),
    Case("8B", 8, 4, {**CHECKPOINTED, "replicas": 2}),
    Case("0.6B", 1, 4, {"activation_memory_budget": 0.5}),
    Case("8B", 8, 4, {"gradient_checkpointing": True, "shard_optimizer": True}),
    Case("0.6B", 2, 4, {**FSDP, "tensor_parallel": 2}),
    Case("0.6B", 2, 4, {**FSDP, "tensor_parallel": 2, "reshard_after_forward": False}),
    Case("8B", 8, 4, {**CHECKPOINTED, "tensor_parallel": 2}),
    Case("8B", 8, 2, {**FSDP, "tensor_parallel": 4}),
    Case("8B", 8, 1, {**FSDP, "context_parallel": 4, "block_size": 8 * LENGTH}),
    Case("8B", 8, 1, {**CHECKPOINTED, "context_parallel": 8, "block_size": 32 * LENGTH}),
    Case("30B-A3B-3-layers", 1, 4, {}),
    Case("30B-A3B-3-layers", 1, 4, FSDP),
    Case("30B-A3B-3-layers", 1, 4, {"torch_compile": False}),
    Case("30B-A3B-3-layers", 1, 4, {**FSDP, "torch_compile": False}),
    Case("30B-A3B-3-layers", 1, 4, CHECKPOINTED),
    Case("30B-A3B-3-layers", 1, 4, {**FSDP, "optim": "muon"}),
    Case("mixture of 32", 1, 4, {}),
    Case("mixture of 32", 1, 4, {"gradient_checkpointing": True}),
    Case("mixture of 32", 8, 4, FSDP),
    Case("30B-A3B", 8, 1, CHECKPOINTED),
    Case("8B", 1, 1, {**ADAPTERS, "gradient_checkpointing": True}),
    Case("8B", 1, 1, ADAPTERS),
    Case("8B", 2, 1, {**CHECKPOINTED, **ADAPTERS}),
    Case("8B", 1, 1, {**CHECKPOINTED, **ADAPTERS, "cpu_offload": True}),
    Case("0.6B", 1, 4, {**ADAPTERS, "lora_dropout": 0.05}),
    Case("0.6B", 1, 4, {**ADAPTERS, "torch_compile": False}),
    Case("0.6B", 1, 4, {"float8": True}),
    Case("8B", 8, 4, {**FSDP, "float8": True}),
    Case("8B", 4, 4, {**CHECKPOINTED, "float8": True}),
    Case("8B", 8, 4, {**CHECKPOINTED, "float8": True, "torch_compile": False}),
]


def main() -> None:
    """Predict and measure one case after another, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))), help="Their numbers, from 0.")
    numbers = parser.parse_args().cases.split(",")
    if unknown := [number for number in numbers if not number.isdecimal() or int(number) >= len(CASES)]:
        parser.error(f"--cases {unknown[0]}: pass numbers from 0 to {len(CASES) - 1}, as in 0,3")
    cases = [CASES[int(number)] for number in numbers]
    where = torch.cuda.get_device_properties(0).name if ON_GPU else "no GPU"
    print(f"{where}, torch {torch.__version__}\n")
    print("| model | ranks | micro-batch | | predicted GiB | measured | ratio | highest |\n" + "|---" * 8 + "|")
    for case in cases:
        with measuring(case) as result:
            predicted = predict_case(case)  # meanwhile
            try:
                measured = result.result() if ON_GPU else 0.0
                measured_cells = [f"{measured:.1f}", f"{predicted.total / GIB / measured:.3f}"] if ON_GPU else ["", ""]
            except Exception as error:
                measured_cells = [f"failed: {first_line(error)}", ""]
        cells = [
            case.model,
            case.ranks,
            case.sequences,
            case,
            f"{predicted.total / GIB:.1f}",
            *measured_cells,
            predicted.phase,
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


@contextlib.contextmanager
def measuring(case: Case) -> Iterator[Future[float]]:
    """A process that measures a case, where measured_cells is a GPU."""
    with ProcessPoolExecutor(max_workers=1, mp_context=PROCESSES) as process:
        yield process.submit(measure, case) if ON_GPU else Future()


def predict_case(case: Case) -> Memory:
    """The prediction, from the configuration alone."""
    model = build_model(case.options, configuration(MODELS[case.model]))
    return predict(model, case.options, case.ranks)


def measure(case: Case) -> float:
    """The peak of rank 0 in GiB; must run in a process of its own."""
    rank = build(case.options, MODELS[case.model], case.ranks)
    with torch.no_grad():  # any values; the CPU would draw billions of numbers for minutes
        for parameter in rank.model.parameters():
            part = getattr(parameter, "to_local", lambda full=parameter: full)()
            part.copy_(torch.empty_like(part, device=rank.device).normal_(std=0.02))
    tokens_BT = torch.randint(0, 512, (case.sequences, case.options.block_size or LENGTH), device=rank.device)
    for step in range(4):
        if step == 2:  # the first were for compilation and for the optimizer's state
            torch.cuda.reset_peak_memory_stats()
        rank.step(tokens_BT)
    return torch.cuda.max_memory_allocated() / GIB


if __name__ == "__main__":
    main()
