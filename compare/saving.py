"""What a checkpoint costs: how long training waits for one, with asynchronous saving and without; a resume.

    python -m compare.saving --config_name DIR [other options of train.py]

Trains twice with the same options on one process, saving every 80 of 400 steps, once with asynchronous saving and once
without, and prints the median stall of a save for both, their ratio, and the bytes of a checkpoint. The first save of
each run is left out: it allocates the copy, page-locked on a GPU. Between two saves there must be time to write one.
It then resumes from the last one: that is chosen, which checks the hash of every file, and loaded. Beside them, what
the disk does by itself: the same bytes written to one file and synced, and read with their hash.
"""

import argparse
import hashlib
import os
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
from metrics.records import read_records

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


STEPS = ["--max_steps", "400", "--save_steps", "80", "--logging_steps", "80", "--save_total_limit", "1"]


def stalls(options: list[str], output_dir: Path) -> list[float]:
    """Seconds that training stood still for each save but the first and the last of a run."""
    subprocess.run(
        [sys.executable, TRAIN, *options, *STEPS, "--output_dir", output_dir], check=True, stdout=subprocess.DEVNULL
    )
    records = [record for record in read_records(output_dir / "metrics.jsonl") if "loss" in record]
    return [record["save_seconds"] for record in records][2:]


def resume(options: list[str], output_dir: Path) -> float:
    """Seconds to choose and to load the checkpoint of the last step."""
    options = [*options, *STEPS, "--output_dir", str(output_dir), "--resume_from_checkpoint", "auto"]
    command = [sys.executable, "-m", "compare.saving", "--timed", *options]
    printed = subprocess.run(command, cwd=TRAIN.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    return sum(float(line.split()[1]) for line in printed.splitlines() if line.startswith("timed "))


def run_timed(options: list[str]) -> None:
    """In a process of its own: train.py, which says how long the two functions take that a resume is made of."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            print("timed", time.perf_counter() - start, flush=True)
            return result

        return call

    checkpoint.choose_checkpoint = timed(checkpoint.choose_checkpoint)
    checkpoint.load_checkpoint = timed(checkpoint.load_checkpoint)
    sys.argv = ["train.py", *options]
    runpy.run_path(str(TRAIN), run_name="__main__")


def disk(path: Path, size: int) -> tuple[float, float]:
    """Seconds that `size` random bytes take to be written and synced, and to be read and hashed."""
    content = random.Random(0).randbytes(size)
    start = time.perf_counter()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256").hexdigest()
    return written - start, time.perf_counter() - written


def main(options: list[str]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        runs = {mode: stalls([*options, "--async_save", mode], Path(name) / mode) for mode in ("true", "false")}
        loaded = resume(options, Path(name) / "false")
        files = [path for path in (Path(name) / "false" / "checkpoint-400").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        written, read = disk(Path(name) / "plain", size)
    asynchronous, synchronous = (statistics.median(runs[mode]) for mode in ("true", "false"))
    print(f"checkpoint          {size / 2**30:.3f} GiB")
    print(f"disk alone          {written:.3f} s to write and sync as many bytes, {read:.3f} s to read and hash them")
    print(f"stall, synchronous  {synchronous:.3f} s  {[round(value, 3) for value in runs['false']]}")
    print(f"stall, asynchronous {asynchronous:.3f} s  {[round(value, 3) for value in runs['true']]}")
    print(f"ratio               {synchronous / asynchronous:.1f}")
    print(f"resume              {loaded:.3f} s, {loaded / read:.1f} times what reading and hashing take alone")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        run_timed(sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(prog="python -m compare.saving", description=__doc__, allow_abbrev=False)
        main(parser.parse_known_args()[1])
