"""The ledger: which rows each step learned from, with a hash of their tokens; and the command that checks it.

    python -m data.ledger OUTPUT_DIR          no step missing, no row twice in an epoch, no row changed?
                                              (of a mixture: no row more often than its source is gone through)
    python -m data.ledger OUTPUT_DIR OTHER    and the same global batches as in another run?

With --ledger, rank R writes OUTPUT_DIR/ledger/rank-R.jsonl, a line for each of its steps: `step`, and `rows`, each as
[number, tokens, first 16 digits of the SHA-256 of its token ids]. about.json tells what an epoch is: of each source,
the rows that it has and those that are drawn.
"""

import argparse
import hashlib
import json
import sys
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.options import Options
from config.plan import Plan
from data.sequences import Mixture, PreparedDataset
from data.stream import ENDLESS, StreamingDataset
from metrics.records import drop_records_beyond, read_records

Entry = tuple[int, int, str]

Batch = dict[str, Tensor]


class Ledger:
    """Writes one rank's part. A step is written when all ranks have begun it, before its forward."""

    def __init__(
        self, options: Options, rank: int, plan: Plan, rows: PreparedDataset | Mixture | StreamingDataset, step: int
    ) -> None:
        """Goes on after `step`. Rank 0 removes what an earlier run, on any number of ranks, wrote beyond it.

        Ranks that split a sequence among themselves have the same sequences: the first of them writes.
        """
        self.writes = options.ledger and rank % options.model_parallel_size == 0
        if not self.writes:
            return
        folder = Path(options.output_dir) / "ledger"
        folder.mkdir(exist_ok=True)
        self.path = folder / f"rank-{rank}.jsonl"
        if rank == 0:
            for path in folder.glob("rank-*.jsonl"):
                drop_records_beyond(path, step)
            about = {
                "rows": len(rows),
                "sources": rows.sources,
                "global_batch_size": plan.global_batch_size,
                "steps_per_epoch": plan.steps_per_epoch or ENDLESS,
            }
            (folder / "about.json").write_text(json.dumps(about))

    def write(self, step: int, batches: list[Batch]) -> None:
        """Record the rows of this rank's micro-batches, from the tensors that the model is about to see."""
        if not self.writes:
            return
        rows = []
        for batch in batches:
            numbers, lengths = batch["indices"].tolist(), batch["tokens"].tolist()
            sequences = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
            for index, number in enumerate(numbers):
                ids = torch.cat(sequences[index :: len(numbers)])  # one sequence, or the two of a pair
                rows.append((number, len(ids), hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]))
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")


def read(output_dir: Path) -> dict[int, list[Entry]]:
    """The global batch of each step, in the order of row numbers, whichever ranks had them.

    A last step that was cut off, so that not all ranks have written it, is left out.
    """
    steps: dict[int, list[Entry]] = defaultdict(list)
    for path in (output_dir / "ledger").glob("rank-*.jsonl"):
        for line in read_records(path):
            steps[line["step"]] += [tuple(row) for row in line["rows"]]
    last = max(steps, default=0)
    if steps and len(steps[last]) < _about(output_dir)["global_batch_size"]:
        del steps[last]
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def problems(output_dir: Path) -> list[str]:
    """What is wrong with a run's ledger, in words; an empty list if nothing is."""
    about, steps = _about(output_dir), read(output_dir)
    found = []
    if list(steps) != list(range(1, len(steps) + 1)):
        missing = sorted(set(range(1, max(steps) + 1)) - set(steps))
        found.append(f"steps {missing} are missing")
    first_seen: dict[int, Entry] = {}
    epochs: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # the steps that had a row
    ends = list(accumulate(rows for rows, _ in about["sources"]))
    for step, rows in steps.items():
        if len(rows) != about["global_batch_size"]:
            found.append(f"step {step} has {len(rows)} rows, not {about['global_batch_size']}")
        number = (step - 1) // about["steps_per_epoch"]
        epoch = epochs[number]
        for row in rows:
            size, drawn = about["sources"][bisect_right(ends, row[0]) % len(ends)]
            passes = -(-(number + 1) * drawn // size) - number * drawn // size  # of the source, that the epoch touches
            if len(epoch[row[0]]) >= passes:
                found.append(f"row {row[0]} is in step {epoch[row[0]][-1]} and again in step {step} of the same epoch")
            if row[0] not in range(about["rows"]) or first_seen.setdefault(row[0], row) != row:
                found.append(f"row {row[0]} of step {step} is not the one it was before")
            epoch[row[0]].append(step)
    return found


def differences(output_dir: Path, other: Path) -> list[str]:
    """The steps whose global batches differ between two runs, as far as both have gone."""
    ours, theirs = read(output_dir), read(other)
    return [
        f"step {step}: other rows than in {other}" for step in ours.keys() & theirs.keys() if ours[step] != theirs[step]
    ]


def _about(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "ledger" / "about.json").read_text())


def main(argv: list[str]) -> int:
    """Print what is wrong and return 1, or print what was checked and return 0."""
    parser = argparse.ArgumentParser(prog="python -m data.ledger", description="Check the ledger of a run.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="the output directory of a run to compare with")
    arguments = parser.parse_args(argv)
    directories = [path for path in (arguments.output_dir, arguments.other) if path]
    for path in directories:
        if not (path / "ledger" / "about.json").exists():
            print(f"{path}: it has no ledger; train with --ledger", file=sys.stderr)
            return 2
    found = differences(*directories) if arguments.other else []
    found += [f"{path}: {problem}" for path in directories for problem in problems(path)]
    for problem in found[:20]:
        print(problem)
    if found:
        print(f"{len(found)} problems")
        return 1
    for path in directories:
        about, steps = _about(path), read(path)
        if about["rows"] == ENDLESS:
            print(f"{path}: {len(steps)} steps of {about['global_batch_size']} rows of a stream, without a row twice")
            continue
        whole, into = divmod(len(steps), about["steps_per_epoch"])
        used = about["steps_per_epoch"] * about["global_batch_size"]
        once = "exactly once" if len(about["sources"]) == 1 else "drawn by weight"
        print(
            f"{path}: {len(steps)} steps of {about['global_batch_size']} rows; {whole} whole epochs, each with {used} "
            f"of {about['rows']} rows {once}, and {into} steps of the next without a row too often"
        )
    if arguments.other:
        print(f"the same global batches in all {min(len(read(path)) for path in directories)} steps of both")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
