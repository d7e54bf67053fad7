"""Reads the flight recordings of a run with --flight_recorder that has hung: which rank entered which collective.

    python -m runtime.hang OUTPUT_DIR

For each process group, the collectives that some rank has not completed or not entered. The recordings are the JSON
files of output_dir/hang. torch's own recordings there, nccl-trace-rank-N, are pickles, and this command leaves them.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import OptionError


class Call(NamedTuple):
    """A collective that a rank has entered."""

    number: int  # within its process group, from 1; equal numbers are the same collective
    name: str  # "all_reduce [96, 32]"
    completed: bool


Groups = dict[str, dict[int, list[Call]]]  # process group -> rank -> its calls, the last one last


def main(arguments: list[str]) -> None:
    """Print what the recordings of an output directory say. Raises OptionError if there is none."""
    if len(arguments) != 1:
        raise OptionError("pass one output directory: python -m runtime.hang OUTPUT_DIR")
    print("\n".join(compare(read(Path(arguments[0]) / "hang"))))


def read(directory: Path) -> Groups:
    """The recordings of all ranks. Raises OptionError if there is none, or if one cannot be read."""
    groups: Groups = {}
    paths = sorted(directory.glob("rank-*-*.json"))
    for path in paths:
        _, rank, backend = path.stem.split("-")
        try:
            for entry in json.loads(path.read_text())["entries"]:
                if not entry["is_p2p"]:
                    group = f"{entry['process_group'][1] or entry['process_group'][0]} ({backend})"
                    groups.setdefault(group, {}).setdefault(int(rank), []).append(_call(entry, backend))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise OptionError(f"{path}: it cannot be read: {error!r}\nremove it to read the other files") from error
    if not groups:
        raise OptionError(f"{directory}: no recording of a hang; train with --flight_recorder, and wait for one")
    return groups


def compare(groups: Groups) -> list[str]:
    """Lines: for each process group, where its ranks are if they have not all completed the same collectives."""
    lines = []
    for group, ranks in groups.items():
        last = {rank: calls[-1].number for rank, calls in ranks.items()}
        waits = {rank: next((call for call in calls if not call.completed), None) for rank, calls in ranks.items()}
        if len(set(last.values())) == 1 and not any(waits.values()):
            lines.append(f"{group}: ranks {', '.join(map(str, ranks))} have completed {max(last.values())} collectives")
            continue
        lines.append(f"{group}:")
        for rank, calls in sorted(ranks.items()):
            call = waits[rank]
            where = f"waits in {call.number}, {call.name}" if call else f"has completed {last[rank]}, {calls[-1].name}"
            behind = max(last.values()) - last[rank]
            lines.append(f"  rank {rank} {where}" + (f"; it has not entered the {behind} after it" if behind else ""))
    return lines


def _call(entry: dict[str, Any], backend: str) -> Call:
    # gloo never says that a collective is completed, but retires it then. NCCL retires also those that time out.
    completed = entry["retired"] if backend == "gloo" else entry["state"] == "completed"
    name = f"{entry['profiling_name'].split(':')[-1]} {', '.join(map(str, entry['input_sizes']))}".rstrip()
    return Call(int(entry["collective_seq_id"]), name, bool(completed))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        sys.exit(f"error: {error}")
