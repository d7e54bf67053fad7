"""How soon this trainer comes to a validation loss, with one optimizer or precision and with another.

    python -m compare.convergence [--variants "bf16;float8"] [--rates 3e-3,6e-3] [--steps 1000] [--loss 3.0] [--ranks 2]

Trains the model of `make train` on the embedded corpus, once for each variant and learning rate, with its schedule cut
to `--steps`: on two CPU ranks, or where there are GPUs, on one each. Prints the steps and the seconds of training,
evaluations left out, after which the validation loss was first at most `--loss`, between two evaluations along a line;
and the last validation loss.
"""

import argparse
import itertools
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compare.bench import started
from compare.packing import TRAIN
from metrics.records import read_records

VARIANTS = {
    "AdamW": [],
    "bf16 moments": ["--optim_state_dtype", "bfloat16"],
    "Muon": ["--optim", "muon"],
    "bf16": ["--bf16", "true"],
    "float8": ["--bf16", "true", "--float8", "true"],
}


def main() -> None:
    """Train every variant at every rate, and print the table as it grows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", default="AdamW;Muon", help="Names between semicolons.")
    parser.add_argument("--rates", default="3e-3,6e-3,1.2e-2", help="Highest learning rates, between commas.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--loss", type=float, default=3.0, help="Validation loss to come to, in nats per token.")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="Processes, one per GPU.")
    arguments = parser.parse_args()
    if unknown := set(arguments.variants.split(";")) - VARIANTS.keys():
        parser.error(f"--variants {min(unknown)}: pass {'; '.join(VARIANTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended too
    print(f"| | learning rate | steps to {arguments.loss:g} | seconds | loss after {arguments.steps} steps | seconds |")
    print("|---" * 6 + "|", flush=True)
    for variant in arguments.variants.split(";"):
        for rate in arguments.rates.split(","):
            with tempfile.TemporaryDirectory() as name:
                argv = ["--max_steps", str(arguments.steps), "--learning_rate", rate, "--eval_steps", "50"]
                argv += ["--save_steps", "0", "--output_dir", name, *VARIANTS[variant]]
                with started(arguments.ranks, [str(TRAIN), *argv], f"{name}/log") as processes:
                    processes[0].communicate()
                if processes[0].returncode:
                    sys.exit(Path(f"{name}/log").read_text()[-2000:])
                curve = evaluations(read_records(Path(name) / "metrics.jsonl"))
            reached = first_at(arguments.loss, curve)
            steps, seconds = (f"{reached[0]:,.0f}", f"{reached[1]:.0f}") if reached else ("never", "")
            end = f"{curve[-1][2]:.3f} | {curve[-1][1]:.0f}"
            print(f"| {variant} | {rate} | {steps} | {seconds} | {end} |", flush=True)


def evaluations(records: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Step, seconds of training so far, and validation loss at each evaluation."""
    curve, seconds, seen = [], 0.0, 0
    for record in records:
        if "loss" in record:
            seconds, seen = (
                seconds + (record["tokens_seen"] - seen) / record["tokens_per_second"],
                record["tokens_seen"],
            )
        else:
            curve.append((record["step"], seconds, record["eval_loss"]))
    return curve


def first_at(loss: float, curve: list[tuple[float, float, float]]) -> tuple[float, float] | None:
    """Step and seconds at which the line between evaluations first comes down to `loss`."""
    for (step, seconds, before), (next_step, next_seconds, after) in itertools.pairwise(curve):
        if after <= loss:
            fraction = (before - loss) / (before - after)
            return step + fraction * (next_step - step), seconds + fraction * (next_seconds - seconds)
    return None


if __name__ == "__main__":
    main()
