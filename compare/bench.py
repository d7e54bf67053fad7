"""How fast this trainer is, and how fast others are with the same model and blocks, on one machine and in one hour.

    python -m compare.bench [--model 0.6B] [--batch 4] [--variants "ours;HF Trainer"]

Each variant runs in a process of its own: random weights in fp32, computed in bf16 on a GPU, fused AdamW, clipping to
1, blocks of the embedded corpus; on one GPU, or without one on two CPU ranks with the model of `make train`. Prints,
for each: the median tokens per second after the first 10 of 30 steps; the share that the model's operations
(model/loss.py says which) are of the rate of a plain matrix product, measured first; the peak memory; the seconds of
the first 5 steps, in which layers are compiled; the share of the time after the first 10 in which this trainer waited
for its data; and the ratio to HF Trainer. What is not installed is named and left out.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

import config
from compare.packing import QWEN3_600M, TRAIN
from compare.peers import PEERS, WINDOW, WINDOWS
from metrics import read_rows
from model.build import load_config_and_tokenizer
from model.loss import flops_per_token

ON_GPU = torch.cuda.is_available()
RANKS = 1 if ON_GPU else 2
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": QWEN3_600M,
    "1.7B": {**QWEN3_600M, "hidden_size": 2048, "intermediate_size": 6144},
}
OURS = {
    "ours": [],
    "ours, sharded": ["--strategy", "fsdp"],
    "ours, not compiled": ["--torch_compile", "false"],
}


class Result(NamedTuple):
    """What one variant reached."""

    speed: float  # tokens per second
    gib: float  # of rank 0
    first: float  # seconds of the first window
    waiting: float = 0.0  # share of the later ones


def main() -> None:
    """Measure one variant after another, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="0.6B", help="The shape of this Qwen3; on a GPU only.")
    parser.add_argument("--batch", type=int, default=4, help="Blocks of a micro-batch.")
    parser.add_argument("--variants", default=";".join([*OURS, *PEERS] if ON_GPU else ["ours", "HF Trainer"]))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended too
    with tempfile.TemporaryDirectory() as name:
        argv = ["--per_device_train_batch_size", str(arguments.batch), "--validation_split_percentage", "0"]
        argv += ["--weight_decay", "0.1", "--learning_rate", "1e-4", "--save_steps", "0", "--eval_steps", "0"]
        if ON_GPU:
            (Path(name) / "config.json").write_text(json.dumps(SHAPES[arguments.model]))
            argv += ["--config_name", name, "--block_size", "4096"]
        options = config.parse(argv)
        model_config, _ = load_config_and_tokenizer(options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        rate, flops = matmul_rate(), flops_per_token(model, options.block_size or 0) or 0.0
        where = torch.cuda.get_device_name() if ON_GPU else f"{RANKS} CPU ranks"
        print(f"{where}, torch {torch.__version__}; a matrix product runs at {rate / 1e12:,.2f} TFLOP/s")
        print(f"{model.num_parameters():,} parameters, {arguments.batch} blocks of {options.block_size} tokens")
        results = {}
        for variant in arguments.variants.split(";"):
            if variant in PEERS and not importlib.util.find_spec("accelerate"):
                print(f"{variant}: accelerate is not installed")
                continue
            result = (peer if variant in PEERS else ours)(variant, [*argv, "--output_dir", f"{name}/{variant}"])
            if result:
                results[variant] = result
                print(f"{variant}: {result}", flush=True)
            else:
                print(f"{variant}: failed\n" + Path(f"{name}/{variant}.log").read_text()[-2000:], flush=True)

    print("\n| | tokens/s | of the matrix product | GiB | first 5 steps | waits for data | to HF Trainer |")
    print("|---" * 7 + "|")
    for variant, (speed, gib, first, waiting) in results.items():
        ratio = f"{speed / results['HF Trainer'].speed:.2f}" if "HF Trainer" in results else ""
        cells = [f"{speed:,.0f}", f"{speed * flops / rate:.0%}", f"{gib:.1f}", f"{first:.0f} s"]
        cells += [f"{waiting:.2%}" if variant in OURS else "", ratio]
        print(f"| {variant} | {' | '.join(cells)} |")


def launch(program: list[str]) -> list[str]:
    """The command that runs a program of this tree on RANKS processes."""
    if RANKS == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), *program]


def ours(variant: str, argv: list[str]) -> Result | None:
    """train.py, ended when its metrics.jsonl holds enough: a checkpoint of the end is not what is measured."""
    steps = ["--logging_steps", str(WINDOW), "--max_steps", "1000000"]
    with open(f"{argv[-1]}.log", "w") as log:
        process = subprocess.Popen(
            launch([str(TRAIN), *argv, *steps, *OURS[variant]]), stdout=log, stderr=log, start_new_session=True
        )
    rows: list[dict[str, Any]] = []
    try:
        while len(rows) < WINDOWS and process.poll() is None:
            time.sleep(1)
            rows = read_rows(Path(argv[-1]) / "metrics.jsonl")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the session that it was started in: ranks and loaders too
            process.wait()
    if len(rows) < WINDOWS:
        return None
    tokens = rows[0]["tokens_seen"]  # of a window
    waiting = median([row["data_wait_seconds"] * row["tokens_per_second"] / tokens for row in rows])
    speed = median([row["tokens_per_second"] for row in rows])
    return Result(speed, rows[-1]["peak_memory_gib"], tokens / rows[0]["tokens_per_second"], waiting)


def peer(variant: str, argv: list[str]) -> Result | None:
    """Another trainer: compare/peers.py."""
    command = launch(["-m", "compare.peers", variant, *argv])
    with open(f"{argv[-1]}.log", "w") as log:
        done = subprocess.run(command, cwd=TRAIN.parent, stdout=subprocess.PIPE, stderr=log, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"speeds"')]
    return Result(median(lines[0]["speeds"]), lines[0]["gib"], lines[0]["first"]) if lines else None


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
