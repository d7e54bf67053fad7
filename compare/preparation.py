"""What preparing data costs: text tokenized and packed per second and core, the memory for it, and a start after it.

    python -m compare.preparation MEGABYTES [other options of train.py]

Generates that much text, and a tenth of it, as .jsonl; prepares both with `python -m data.prepare`, with the embedded
tokenizer if the options name no other; and prints MB (10^6 bytes) of text per second of wall time and per second that
all processes computed, the largest resident memory of any of them for both sizes, and how long the same command takes
when all is prepared: the import of torch and transformers, and opening the memory maps. Beside it, what `datasets.map`
takes in one process for the same text and tokenizer, without packing.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from datasets import load_dataset

from config.command_line import parse
from model.build import load_config_and_tokenizer

ROOT = Path(__file__).resolve().parent.parent


class Cost(NamedTuple):
    """Of one command: seconds by the clock, seconds that its processes computed, the largest process in MiB."""

    wall: float
    cpu: float
    memory: float


def generate(path: Path, megabytes: float) -> None:
    """Write documents of 10 to 2,000 words of the README, in an order that is always the same."""
    words, draw = (ROOT / "README.md").read_text().split(), random.Random(0)
    lengths = (int(10 ** draw.uniform(1, 3.3)) for _ in range(5000))
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=length))}) + "\n" for length in lengths]
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            draw.shuffle(lines)
            file.writelines(lines[: 1 + int((megabytes * 1e6 - file.tell()) / 2000)])


def prepare(path: Path, options: list[str]) -> Cost:
    """Run `python -m data.prepare` on a file, with a cache beside it."""
    command = [sys.executable, "-m", "data.prepare", "--train_file", str(path), "--data_cache_dir", f"{path}-cache"]
    command += ["--validation_split_percentage", "0", *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # what it and the processes that it waited for have used
    assert status == 0
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 2**20)


def map_alone(path: Path, options: list[str]) -> float:
    """Seconds that this process computes while `datasets.map` tokenizes a file in batches."""
    arguments = parse(["--data_cache_dir", f"{path}-cache", *options])
    _, tokenizer = load_config_and_tokenizer(arguments)
    records = load_dataset("json", data_files=str(path), cache_dir=f"{path}-datasets", split="train")
    started = time.process_time()
    records.map(lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]}, batched=True, remove_columns="text")
    return time.process_time() - started


def main(megabytes: float, options: list[str]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        costs = []
        for size in (megabytes / 10, megabytes):
            path = Path(name) / f"{size:g}.jsonl"
            generate(path, size)
            nothing = Path(name) / "nothing.jsonl"
            nothing.write_text(json.dumps({"text": "word " * 5000}) + "\n")
            prepare(nothing, [*options, "--data_cache_dir", f"{path}-cache"])  # trains the embedded tokenizer
            costs.append((path.stat().st_size / 1e6, prepare(path, options), prepare(path, options)))
        mapped = map_alone(path, options)
    (_, first, _), (size, all_of_it, again) = costs
    wall, cpu = all_of_it.wall - again.wall, all_of_it.cpu - again.cpu
    print(f"text                {size:,.0f} MB")
    print(f"preparation         {wall:.1f} s, {size / wall:.1f} MB/s; {size / cpu:.2f} MB per second and core")
    print(f"datasets.map        {size / mapped:.2f} MB per second and core")
    print(f"largest process     {all_of_it.memory:.0f} MiB; for a tenth of the text {first.memory:.0f} MiB")
    print(f"start when prepared {again.wall:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="compare.preparation", allow_abbrev=False)
    parser.add_argument("megabytes", type=float)
    arguments, others = parser.parse_known_args()
    main(arguments.megabytes, others)
