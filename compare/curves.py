"""Train the demo on 1, 2 and 4 ranks and draw its loss curves: `python -m compare.curves` writes docs/curves.svg.

All three runs have the same global batch of 16 sequences, so their curves cover one another. A micro-batch has 4
sequences: one rank takes 4 micro-steps, two ranks take 2 and four ranks take 1. The ranks use gloo on the CPU, with one
thread each, in fp32. The caption of the plot has the largest difference between the curves at one step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from config.plan import count
from metrics.records import read_records
from metrics.report.plots import overlaid, to_svg

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 4)
STEPS = 300
INCHES = (6.7, 3.6)
OPTIONS = (
    f"--max_steps {STEPS} --warmup_steps 50 --global_batch_size 16 --per_device_train_batch_size 4 --logging_steps 1 "
    "--validation_split_percentage 0 --save_steps 0 --prompt="
)


def losses(ranks: int, output_dir: Path) -> list[float]:
    """The training loss of each step of the demo on `ranks` ranks."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["train.py", *OPTIONS.split(), "--output_dir", str(output_dir)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [record["loss"] for record in read_records(output_dir / "metrics.jsonl") if "loss" in record]


def main() -> None:
    """Train the demo on each number of ranks, and write docs/curves.svg. Takes some minutes."""
    with tempfile.TemporaryDirectory() as name:
        curves = {count(ranks, "rank"): losses(ranks, Path(name) / str(ranks)) for ranks in RANKS}
    path = ROOT / "docs" / "curves.svg"
    chart = overlaid("curves", "The demo on 1, 2 and 4 ranks", "nats per token", curves)
    path.write_text(to_svg(chart, INCHES))
    print(f"wrote {path}")


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m compare.curves", description=__doc__).parse_args()
    main()
