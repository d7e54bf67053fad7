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

from metrics.records import read_records

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 4)
STEPS = 300
OPTIONS = (
    f"--max_steps {STEPS} --warmup_steps 50 --global_batch_size 16 --per_device_train_batch_size 4 --logging_steps 1 "
    "--validation_split_percentage 0 --save_steps 0 --prompt="
)
# The lines get thinner, so that each stays visible on top of the one before.
STYLES = (("#bbb", 7), ("#4a90d9", 4), ("#c33", 1.2))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 56, 16, 16, 64


def losses(ranks: int, output_dir: Path) -> list[float]:
    """The training loss of each step of the demo on `ranks` ranks."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["train.py", *OPTIONS.split(), "--output_dir", str(output_dir)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [record["loss"] for record in read_records(output_dir / "metrics.jsonl") if "loss" in record]


def plot(curves: dict[int, list[float]]) -> str:
    """An SVG of the loss (nats per token) over steps, a curve for each number of ranks."""
    values = [loss for curve in curves.values() for loss in curve]
    low, high, last = int(min(values)), int(max(values)) + 1, max(map(len, curves.values()))
    difference = max(max(step) - min(step) for step in zip(*curves.values(), strict=True))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    def text(at_x: float, at_y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}"{more}>{words}</text>'

    def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return f'<line {ends} stroke="{color}" stroke-width="{width}"/>'

    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(x(last / 2), HEIGHT - 30, "step"),
        text(
            16, y((low + high) / 2), "loss (nats per token)", more=f' transform="rotate(-90 16 {y((low + high) / 2)})"'
        ),
        text(WIDTH / 2, HEIGHT - 8, f"largest difference between the curves at one step: {difference:.1e} nats"),
    ]
    for loss in range(low, high + 1):
        elements += [
            line(LEFT, y(loss), WIDTH - RIGHT, y(loss), "#eee", 1),
            text(LEFT - 8, y(loss) + 4, str(loss), "end"),
        ]
    for step in range(0, last + 1, 50):
        elements += [line(x(step), y(low), x(step), y(low) + 5, "#333", 1), text(x(step), y(low) + 18, str(step))]
    elements += [line(LEFT, TOP, LEFT, y(low), "#333", 1), line(LEFT, y(low), WIDTH - RIGHT, y(low), "#333", 1)]
    for index, ((ranks, curve), (color, width)) in enumerate(zip(curves.items(), STYLES, strict=True)):
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in enumerate(curve, 1))
        elements.append(f'<polyline fill="none" stroke="{color}" stroke-width="{width}" points="{points}"/>')
        label = f"{ranks} rank{'s' if ranks > 1 else ''}"
        elements.append(line(WIDTH - 110, TOP + 20 + 20 * index, WIDTH - 80, TOP + 20 + 20 * index, color, width))
        elements.append(text(WIDTH - 72, TOP + 24 + 20 * index, label, "start"))
    return "\n".join([*elements, "</svg>\n"])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        curves = {ranks: losses(ranks, Path(name) / str(ranks)) for ranks in RANKS}
    path = ROOT / "docs" / "curves.svg"
    path.write_text(plot(curves))
    print(f"wrote {path}")


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m compare.curves", description=__doc__).parse_args()
    main()
