"""Run the trainer with and without each bug, draw both curves, and write docs/museum.md."""

import argparse
import tempfile
from pathlib import Path

from metrics.records import read_records
from tests import launch, world
from tests.launch import ROOT
from tests.museum.bugs import BUGS, Bug, Curve
from tests.museum.page import anchor, plot, render
from tests.museum.plant import call, plant

STEPS = 40


def write_plots() -> None:
    """Train all curves, then replace the plots of the page."""
    drawn: dict[str, str] = {}
    unchanged = Bug("unchanged", "", 0, "", "", (), "")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        right_tree = plant(unchanged, directory)
        for bug in BUGS:
            if bug.curve:
                right = points(right_tree, bug.curve, directory / f"{anchor(bug)}-right")
                wrong = points(plant(bug, directory), bug.curve, directory / f"{anchor(bug)}-wrong")
                drawn[f"{anchor(bug)}.svg"] = plot(bug.curve.value.replace("_", " "), right, wrong)
                print(f"{bug.name}: {bug.curve.value} after {right[-1][0]} steps {right[-1][1]:.4g}, ", end="")
                print(f"with the bug {wrong[-1][1]:.4g} after {wrong[-1][0]}", flush=True)
    plots = ROOT / "docs" / "museum"
    plots.mkdir(exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for name, drawing in drawn.items():
        (plots / name).write_text(drawing)


def points(tree: Path, curve: Curve, directory: Path) -> list[tuple[int, float]]:
    """The curve that the trainer of `tree` gives: (step, value) of each step whose value is a number."""
    call(tree, "tests.museum.__main__:run", curve, directory)
    records = read_records(directory / "run" / "metrics.jsonl")
    return [(record["step"], record[curve.value]) for record in records if record.get(curve.value) is not None]


def run(curve: Curve, directory: Path) -> None:
    """Train in `directory`, as `curve` says, with the modules of the tree that this process works in."""
    (directory / "model").mkdir(parents=True)
    model, text = world.make_model(directory / "model"), world.make_train_file(directory / "text.jsonl")
    options = [*world.options(model, text, directory / "cache"), "--output_dir", directory / "run"]
    options += ["--max_steps", STEPS, *curve.options]
    if curve.resume_at:
        launch.train(curve.ranks, [*options, "--max_steps", curve.resume_at])
    launch.train(curve.ranks, [*options, "--resume_from_checkpoint", "auto"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.museum", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["page"], help="page: only the page, for a change of no curve")
    if parser.parse_args().what != "page":
        write_plots()
    (ROOT / "docs" / "museum.md").write_text(render(BUGS))
