"""Run the trainer with and without each bug, draw both curves, and write docs/museum.md.

`python -m tests.museum page` writes the page alone, in a second: for a change that moves no curve.
"""

import sys
import tempfile
from pathlib import Path

from metrics.records import read_records
from tests.launch import ROOT
from tests.museum.bugs import BUGS, Bug, Curve
from tests.museum.page import anchor, plot, render
from tests.museum.plant import plant, working_in

STEPS = 40


def main() -> None:
    """Write the page and its plots."""
    plots = ROOT / "docs" / "museum"
    plots.mkdir(exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    unchanged = Bug("unchanged", "", "", "", (), "")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        right_tree = plant(unchanged, directory)
        for bug in BUGS:
            if bug.curve:
                right = points(right_tree, bug.curve, directory / f"{anchor(bug)}-right")
                wrong = points(plant(bug, directory), bug.curve, directory / f"{anchor(bug)}-wrong")
                (plots / f"{anchor(bug)}.svg").write_text(plot(bug.curve.value.replace("_", " "), right, wrong))
                print(f"{bug.name}: {bug.curve.value} after {right[-1][0]} steps {right[-1][1]:.4g}, ", end="")
                print(f"with the bug {wrong[-1][1]:.4g} after {wrong[-1][0]}", flush=True)
    (ROOT / "docs" / "museum.md").write_text(render(BUGS))


def points(tree: Path, curve: Curve, directory: Path) -> list[tuple[int, float]]:
    """The curve that the trainer of `tree` gives: (step, value) of each step whose value is a number."""
    with working_in(tree):
        from tests import launch, world

        (directory / "model").mkdir(parents=True)
        model, text = world.make_model(directory / "model"), world.make_train_file(directory / "text.jsonl")
        options = [*world.options(model, text, directory / "cache"), "--output_dir", directory / "run"]
        options += ["--max_steps", STEPS, *curve.options]
        if curve.resume_at:
            launch.train(curve.ranks, [*options, "--max_steps", curve.resume_at])
        launch.train(curve.ranks, [*options, "--resume_from_checkpoint", "auto"])
        rows = read_records(directory / "run" / "metrics.jsonl")
        return [(row["step"], row[curve.value]) for row in rows if row.get(curve.value) is not None]


if __name__ == "__main__":
    if sys.argv[1:] == ["page"]:
        (ROOT / "docs" / "museum.md").write_text(render(BUGS))
    else:
        main()
