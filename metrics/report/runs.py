"""What runs have left in their output directories. Files may be cut off, of another version, or changed by hand."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import OptionError
from runtime.files import regular_file

LONGEST_LINE = 2**22  # bytes; one record of samples has some kilobytes
MOST_STEPS = 2**53
MOST_FIELDS = 200  # of a record; a few for each validation set
EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"

Numbers = NDArray[np.float64]


class Columns:
    """Records as a column of fp64 for each field, in the order of their steps; NaN where a record has no number.

    A record of a step that came before is from a resumed run: it replaces the records of this step and later ones.
    """

    def __init__(self) -> None:
        self.steps: array[int] = array("q")
        self.values: dict[str, array[float]] = {}
        self.replaced = 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, record: dict[str, Any]) -> None:
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            for column in self.values.values():
                column.pop()
            self.replaced += 1
        self.steps.append(step)
        for name, value in record.items():
            if name not in self.values and _is_number(value) and len(self.values) < MOST_FIELDS:
                self.values[name] = array("d", [math.nan] * (len(self.steps) - 1))
        for name, column in self.values.items():
            column.append(_number(record.get(name)))

    @property
    def step(self) -> Numbers:
        return np.asarray(self.steps, dtype=np.float64)

    def __getitem__(self, name: str) -> Numbers:
        """A column; all NaN if no record has the field."""
        column = self.values.get(name)
        return np.full(len(self), np.nan) if column is None else np.asarray(column, dtype=np.float64)

    def has(self, name: str) -> bool:
        """Whether any record has a finite number in this field."""
        return bool(np.isfinite(self[name]).any())


@dataclass
class Run:
    """One run: its records by kind, its events, and the options and start block of its last start."""

    path: Path
    name: str
    training: Columns = field(default_factory=Columns)
    evaluations: Columns = field(default_factory=Columns)
    samples: dict[int, list[dict[str, str]]] = field(default_factory=dict)  # by step
    events: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    description: dict[str, str] = field(default_factory=dict)  # of the start block, line by line
    notes: list[str] = field(default_factory=list)  # what could not be used

    @property
    def last_step(self) -> int:
        return max([0, *self.training.steps[-1:], *self.evaluations.steps[-1:]])


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs of these output directories. Raises OptionError for a directory without a run."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise OptionError(f"{', '.join(map(str, paths))}: a run is named twice; name each once")
    resolved = [path.resolve() for path in paths]
    names = [path.name or str(path) for path in resolved]
    if len(set(names)) < len(names):  # such as a/output and b/output
        names = ["/".join(path.parts[-2:]) for path in resolved]
    if len(set(names)) < len(names):
        names = [str(path) for path in resolved]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """A run from its output directory. Raises OptionError if there is none, or if its metrics cannot be opened."""
    metrics = path / METRICS
    if not metrics.exists():
        raise OptionError(
            f"{path}: it has no {METRICS}, so it is no output directory of a run\n"
            "pass the --output_dir of a run that has written its first record"
        )
    run, unreadable, unknown = Run(path, _printable(name)), 0, 0
    for record in _records(metrics):
        step = record.get("step") if record is not None else None
        if record is None or isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MOST_STEPS:
            unreadable += 1
        elif "loss" in record:
            run.training.add(step, record)
        elif any(key.startswith("eval_") and key.endswith("_loss") for key in record):
            run.evaluations.add(step, record)
        elif isinstance(record.get("samples"), list):
            for old in [old for old in run.samples if old > step]:  # a resumed run replaces them
                del run.samples[old]
            run.samples[step] = [_sample(sample) for sample in record["samples"] if isinstance(sample, dict)]
        else:
            unknown += 1
    if unreadable:
        run.notes.append(f"{_count(unreadable, 'line')} of {METRICS} could not be read: cut off, or no record")
    if unknown:
        run.notes.append(f"{_count(unknown, 'record')} of {METRICS} of an unknown kind left out")
    if replaced := run.training.replaced + run.evaluations.replaced:
        run.notes.append(f"{_count(replaced, 'record')} left out, because a resumed run repeated their steps")
    if not len(run.training) and not len(run.evaluations):
        run.notes.append(f"{METRICS} has no records yet")
    events = path / EVENTS
    run.events = [event for event in _records(events) if event and "event" in event] if events.exists() else []
    starts = [event for event in run.events if event["event"] == "start"]
    if starts:
        options, text = starts[-1].get("options"), starts[-1].get("description")
        run.options = options if isinstance(options, dict) else {}
        run.description = _lines(text) if isinstance(text, str) else {}
    else:
        run.options = _options_of_checkpoint(path)
        run.notes.append(f"no {EVENTS}, so this page has no start block and no stops: the run is of an older version")
    return run


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file of lines; None for a line that is none. Raises OptionError."""
    try:
        with open(path, "rb", opener=regular_file) as file:
            while line := file.readline(LONGEST_LINE):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if record is not None or line.strip():
                    yield record if isinstance(record, dict) else None
    except OSError as error:
        raise OptionError(f"{path}: it cannot be read: {error.strerror}; pass another run") from error


def _options_of_checkpoint(path: Path) -> dict[str, Any]:
    """The options in the newest checkpoint that can be read, or {}."""
    states = sorted(path.glob("checkpoint-*/state.json"), key=lambda state: state.stat().st_mtime, reverse=True)
    for state in states:
        try:
            options = json.loads(state.read_bytes())["options"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(options, dict):
            return options
    return {}


def _lines(text: str) -> dict[str, str]:
    """The lines of a start block (estimate/start_block.py): names of 13 characters, and their values."""
    lines: dict[str, str] = {}
    last = ""
    for line in text.split("\n"):
        if line.startswith("--- "):  # examples follow
            break
        last = line[:13].strip() or last
        lines[last] = f"{lines.get(last, '')} {line[14:].strip()}".strip()
    return lines


def _sample(sample: dict[str, Any]) -> dict[str, str]:
    return {name: str(sample.get(name, "")) for name in ("prompt", "completion")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """A finite number as it is, and anything else as NaN: null, a text, an infinity, an integer beyond fp64."""
    try:
        number = float(value) if _is_number(value) else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
