"""The speed of this trainer and of others, with the same model and blocks, on one machine and in one run.

    python -m compare.bench [--model 0.6B] [--batch 4] [--ranks 1] [--variants "ours;HF Trainer"] [options of train.py]

Each variant runs in its own process, or in one per rank: random fp32 weights, bf16 compute on a GPU, fused AdamW,
clipping to 1, blocks of the demo's text. It uses one GPU or `--ranks` GPUs; without a GPU, two CPU ranks and the model
of `make train`. For each variant it prints:

    tokens/s         the median over all ranks, after the first two of six windows
    of the product   the model's FLOPs (estimate/flops.py) as a fraction of the rate of a plain matrix product,
                     measured before on the first GPU, or on the CPU
    GiB              the peak memory of a rank
    start            seconds from the command to the first step; of a peer: until training begins
    first steps      seconds of the first window, in which layers are compiled
    waits for data   the fraction of the later time in which rank 0 waited for data (our variants)

and the ratio to HF Trainer. A peer that is not installed is named and left out. Options of train.py go to our variants.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from compare.packing import QWEN3_600M, TRAIN
from compare.peers.trainers import PEERS, WINDOW, WINDOWS, package_of, versions_of
from config.command_line import parse
from estimate.flops import flops_per_token
from metrics.records import read_records
from model.build import load_config_and_tokenizer

ON_GPU = torch.cuda.is_available()
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": QWEN3_600M,
    "1.7B": {**QWEN3_600M, "hidden_size": 2048, "intermediate_size": 6144},
    "8B": {
        **QWEN3_600M,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    # Three layers of Qwen3-30B-A3B: its states in fp32 fit one GPU.
    "30B-A3B-3-layers": {
        **QWEN3_600M,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
OURS = {
    "ours": [],
    "ours, sharded": ["--strategy", "fsdp"],
    "ours, not compiled": ["--torch_compile", "false"],
    "ours, residual in bf16": ["--bf16_residual", "true"],
    "ours, no graphs": ["--cuda_graphs", "false"],
    "ours, bf16 moments": ["--optim_state_dtype", "bfloat16"],
    "ours, float8": ["--float8", "true"],
    "ours, sharded optimizer": ["--shard_optimizer"],
    "ours, tensor parallel": ["--strategy", "fsdp", "--tensor_parallel", "2"],
    "ours, context parallel": ["--strategy", "fsdp", "--context_parallel", "2"],
}
# Make no sense, or are refused, on one.
SEVERAL_RANKS = {"ours, sharded optimizer", "ours, tensor parallel", "ours, context parallel"}


class Result(NamedTuple):
    """What one variant reached."""

    speed: float  # tokens per second
    gib: float  # of rank 0
    first: float  # seconds of the first window
    waiting: float = 0.0  # fraction of the later windows
    start: float = 0.0  # seconds from the command to the first step


def main() -> None:
    """Measure one variant after another, and print the table."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", choices=SHAPES, default="0.6B", help="The shape of this Qwen3; on a GPU only.")
    parser.add_argument("--batch", type=int, default=4, help="Blocks of a micro-batch.")
    parser.add_argument("--ranks", type=int, default=1 if ON_GPU else 2, help="Processes, one per GPU.")
    parser.add_argument("--variants", help='Names between semicolons, as in "ours;HF Trainer".')
    arguments, more = parser.parse_known_args()
    names = [*OURS, *PEERS] if ON_GPU else ["ours", *(name for name in PEERS if not name.endswith("compiled"))]
    if arguments.variants:
        names = arguments.variants.split(";")
        if unknown := [name for name in names if name not in (*OURS, *PEERS)]:
            parser.error(f"--variants {unknown[0]}: pass some of {'; '.join([*OURS, *PEERS])}")
    elif arguments.ranks == 1:
        names = [name for name in names if name not in SEVERAL_RANKS]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended too
    with tempfile.TemporaryDirectory() as name:
        argv = ["--per_device_train_batch_size", str(arguments.batch), "--validation_split_percentage", "0"]
        argv += ["--weight_decay", "0.1", "--learning_rate", "1e-4", "--save_steps", "0", "--eval_steps", "0"]
        if ON_GPU:
            (Path(name) / "config.json").write_text(json.dumps(SHAPES[arguments.model]))
            argv += ["--config_name", name, "--block_size", "4096"]
        options = parse([*argv, *more])  # a word that is no option ends here
        model_config, _ = load_config_and_tokenizer(options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        rate, flops = matmul_rate(), flops_per_token(model, options.block_size or 0) or 0.0
        where = torch.cuda.get_device_name() if ON_GPU else "CPU"
        print(f"{arguments.ranks} ranks, {where}, {versions_of(names)}; product: {rate / 1e12:,.2f} TFLOP/s")
        print(f"{model.num_parameters():,} parameters, {arguments.batch} blocks of {options.block_size} tokens")
        results = {}
        for variant in names:
            if variant in PEERS and not importlib.util.find_spec(package_of(variant)):
                print(f"{variant}: {package_of(variant)} is not installed")
                continue
            measure, options_of = (peer, argv) if variant in PEERS else (ours, [*argv, *more])
            result = measure(variant, arguments.ranks, [*options_of, "--output_dir", f"{name}/{variant}"])
            if result:
                results[variant] = result
                print(f"{variant}: {result}", flush=True)
            else:
                print(f"{variant}: failed\n" + Path(f"{name}/{variant}.log").read_text()[-2000:], flush=True)

    machine_rate = rate * arguments.ranks if ON_GPU else rate
    print(f"\n| | tokens/s | of the product | GiB | start | first {WINDOW} steps | waits for data | to HF Trainer |")
    print("|---" * 8 + "|")
    for variant, (speed, gib, first, waiting, start) in results.items():
        ratio = f"{speed / results['HF Trainer'].speed:.2f}" if "HF Trainer" in results else ""
        cells = [f"{speed:,.0f}", f"{speed * flops / machine_rate:.0%}", f"{gib:.1f}"]
        cells += [f"{start:.1f} s", f"{first:.1f} s"]
        cells += [f"{waiting:.2%}" if variant in OURS else "", ratio]
        print(f"| {variant} | {' | '.join(cells)} |")


@contextlib.contextmanager
def started(
    ranks: int, program: list[str], log: str, read_output: bool = False
) -> Iterator[list[subprocess.Popen[str]]]:
    """A program of this tree on that many processes, rank 0 first; what is left of them at the end is killed.

    They, and whatever they start, are one process group. torchrun would give each rank a session of its own: they
    would outlive it, and slow down the next variant.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    processes: list[subprocess.Popen[str]] = []
    with open(log, "w") as errors:
        try:
            for rank in range(ranks):
                here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
                process = subprocess.Popen(
                    [sys.executable, *program],
                    cwd=TRAIN.parent,
                    env={**threads, **os.environ, **world, **here},
                    stdout=subprocess.PIPE if rank == 0 and read_output else errors,
                    stderr=errors,
                    text=True,
                    process_group=processes[0].pid if processes else 0,
                )
                processes.append(process)
            yield processes
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(processes[0].pid, signal.SIGKILL)
            for process in processes:
                process.wait()


def ours(variant: str, ranks: int, argv: list[str]) -> Result | None:
    """train.py, ended when its metrics.jsonl holds enough: a checkpoint of the end is not what is measured."""
    steps = ["--logging_steps", str(WINDOW), "--max_steps", "1000000"]
    records: list[dict[str, Any]] = []
    begin, first_seen = time.monotonic(), 0.0
    with started(ranks, [str(TRAIN), *argv, *steps, *OURS[variant]], f"{argv[-1]}.log") as processes:
        while len(records) < WINDOWS and all(process.poll() is None for process in processes):
            time.sleep(0.2)
            records = read_records(Path(argv[-1]) / "metrics.jsonl")
            if records:
                first_seen = first_seen or time.monotonic()
    if len(records) < WINDOWS:
        return None
    tokens = records[0]["tokens_seen"]  # of a window
    waiting = median([record["data_wait_seconds"] * record["tokens_per_second"] / tokens for record in records])
    speed = median([record["tokens_per_second"] for record in records])
    first = tokens / records[0]["tokens_per_second"]
    return Result(speed, records[-1]["peak_memory_gib"], first, waiting, first_seen - begin - first)


def peer(variant: str, ranks: int, argv: list[str]) -> Result | None:
    """Another trainer: compare/peers/trainers.py."""
    begin = time.time()
    with started(
        ranks, ["-m", "compare.peers.trainers", variant, *argv], f"{argv[-1]}.log", read_output=True
    ) as processes:
        printed = processes[0].communicate()[0]
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"speeds"')]
    if not lines:
        return None
    seen = lines[0]
    return Result(median(seen["speeds"]), seen["gib"], seen["first"], start=seen["began"] - begin)


def median(values: list[float]) -> float:
    """Of the windows after the first two."""
    return statistics.median(values[2:WINDOWS])


def matmul_rate() -> float:
    """FLOP/s of a large matrix product of random numbers: bf16 on a GPU, fp32 on the CPU's cores."""
    size, dtype, device = (8192, torch.bfloat16, "cuda") if ON_GPU else (2048, torch.float32, "cpu")
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        left @ right
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


if __name__ == "__main__":
    main()
