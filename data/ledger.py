"""The ledger: which sequences each step trained on, with a hash of their tokens; and the command that checks it.

    python -m data.ledger OUTPUT_DIR          checks one run
    python -m data.ledger OUTPUT_DIR OTHER    checks two runs, and that both have the same global batches

In a run, no step may be missing, no sequence may change, and no sequence may come twice in an epoch. With a mixture, an
epoch may pass several times over a source; a sequence comes at most once in each pass.

With --ledger, rank R writes OUTPUT_DIR/ledger/rank-R.jsonl. Each step is a line with `step` and `sequences`. A sequence
is [number, tokens, first 16 digits of the SHA-256 of its token ids]. about.json says what an epoch is: `sources` lists
how many sequences each source has, and how many of them an epoch draws.
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

from config.errors import OptionError, noting
from config.options import Options
from config.plan import Plan
from data.sequences import Mixture, PreparedDataset
from data.stream import ENDLESS, StreamingDataset
from metrics.records import drop_records_beyond, read_records
from runtime.files import regular_file, replace_text

Entry = tuple[int, int, str]

Batch = dict[str, Tensor]


class Ledger:
    """Writes the file of one rank. A step is written after its batches are read and before its forward."""

    def __init__(
        self,
        options: Options,
        rank: int,
        plan: Plan,
        sequences: PreparedDataset | Mixture | StreamingDataset,
        step: int,
    ) -> None:
        """Continue after `step`. Rank 0 removes the later steps that an earlier run wrote, on any number of ranks.

        The ranks of a tensor-parallel or context-parallel group have the same sequences, so the first of them writes.
        """
        self.failures: list[OptionError] = []  # of writes; the loop tells the other ranks
        self.writes = options.ledger and rank % options.model_parallel_size == 0
        if not self.writes:
            return
        folder = Path(options.output_dir) / "ledger"
        with noting(self.failures, folder):
            folder.mkdir(exist_ok=True)
        self.path = folder / f"rank-{rank}.jsonl"
        if rank == 0:
            about = {
                "sequences": len(sequences),
                "sources": sequences.sources,
                "global_batch_size": plan.global_batch_size,
                "steps_per_epoch": plan.steps_per_epoch or ENDLESS,
            }
            with noting(self.failures, folder):
                for path in folder.glob("rank-*.jsonl"):
                    drop_records_beyond(path, step)
                replace_text(folder / "about.json", json.dumps(about))

    def write(self, step: int, batches: list[Batch]) -> None:
        """Record the sequences of this rank's micro-batches, from the tensors that the model gets."""
        if not self.writes:
            return
        sequences = []
        for batch in batches:
            numbers, lengths = batch["indices"].tolist(), batch["tokens"].tolist()
            inputs = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
            for index, number in enumerate(numbers):
                ids = torch.cat(inputs[index :: len(numbers)])  # one sequence, or the two of a pair
                sequences.append((number, len(ids), hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]))
        with noting(self.failures, self.path), open(self.path, "a", opener=regular_file) as file:
            file.write(json.dumps({"step": step, "sequences": sequences}) + "\n")


def read(output_dir: Path) -> dict[int, list[Entry]]:
    """The global batch of each step, over all ranks, in the order of sequence numbers.

    An interrupted last step, which some ranks have not written, is left out.
    """
    steps: dict[int, list[Entry]] = defaultdict(list)
    for path in (output_dir / "ledger").glob("rank-*.jsonl"):
        for line in read_records(path):
            steps[line["step"]] += [tuple(sequence) for sequence in line["sequences"]]
    last = max(steps, default=0)
    if steps and len(steps[last]) < _about(output_dir)["global_batch_size"]:
        del steps[last]
    return {step: sorted(sequences) for step, sequences in sorted(steps.items())}


def problems(output_dir: Path) -> list[str]:
    """The faults of a run's ledger, as messages. The list is empty if there are none."""
    about, steps = _about(output_dir), read(output_dir)
    found = []
    if list(steps) != list(range(1, len(steps) + 1)):
        missing = sorted(set(range(1, max(steps) + 1)) - set(steps))
        found.append(f"steps {missing} are missing")
    first_seen: dict[int, Entry] = {}
    epochs: dict[int, dict[int, list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )  # by number of sequence, the steps that had it
    ends = list(accumulate(sequences for sequences, _ in about["sources"]))
    for step, sequences in steps.items():
        if len(sequences) != about["global_batch_size"]:
            found.append(f"step {step} has {len(sequences)} sequences, not {about['global_batch_size']}")
        number = (step - 1) // about["steps_per_epoch"]
        epoch = epochs[number]
        for sequence in sequences:
            index = sequence[0]
            size, drawn = about["sources"][bisect_right(ends, index) % len(ends)]
            passes = -(-(number + 1) * drawn // size) - number * drawn // size  # over the source, in this epoch
            if len(epoch[index]) >= passes:
                found.append(
                    f"sequence {index} is in step {epoch[index][-1]} and again in step {step} of the same epoch"
                )
            if index not in range(about["sequences"]):
                found.append(f"sequence {index} of step {step} is not one of the {about['sequences']} that exist")
            elif first_seen.setdefault(index, sequence) != sequence:
                found.append(f"sequence {index} of step {step} has other tokens than before")
            epoch[index].append(step)
    return found


def differences(output_dir: Path, other: Path) -> list[str]:
    """The steps whose global batches differ between two runs, as messages. Only steps of both runs are compared."""
    ours, theirs = read(output_dir), read(other)
    return [
        f"step {step}: other sequences than in {other}"
        for step in ours.keys() & theirs.keys()
        if ours[step] != theirs[step]
    ]


def _about(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "ledger" / "about.json").read_text())


def main(argv: list[str]) -> int:
    """Print the faults and return 1, or print what was checked and return 0. Without a ledger, return 2."""
    parser = argparse.ArgumentParser(prog="python -m data.ledger", description="Check the ledger of a run.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="the output directory of a run to compare with")
    arguments = parser.parse_args(argv)
    directories = [path for path in (arguments.output_dir, arguments.other) if path]
    for path in directories:
        if not (path / "ledger" / "about.json").exists():
            print(f"{path}: has no ledger; train with --ledger", file=sys.stderr)
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
        if about["sequences"] == ENDLESS:
            print(f"{path}: {len(steps)} steps of {about['global_batch_size']} sequences of a stream, none twice")
            continue
        whole, into = divmod(len(steps), about["steps_per_epoch"])
        used = about["steps_per_epoch"] * about["global_batch_size"]
        once = "exactly once" if len(about["sources"]) == 1 else "drawn by weight"
        print(
            f"{path}: {len(steps)} steps of {about['global_batch_size']} sequences; {whole} whole epochs, each with "
            f"{used} of {about['sequences']} sequences {once}, and {into} steps of the next, no sequence too often"
        )
    if arguments.other:
        print(f"the same global batches in all {min(len(read(path)) for path in directories)} steps of both")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
