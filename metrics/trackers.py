"""Trackers: TensorBoard, wandb and SwanLab get the records of a run, as pictures that can be looked at from elsewhere.

Each is optional and imported only if --report_to names it. Only rank 0 has them. A tracker never ends or delays a run:
a thread of its own does its work, and reads from a queue what it should show. If the tracker fails, that is said once,
and the run continues without it. A resumed run continues the run of each tracker, by an id in output_dir/trackers.json.

No command line, environment, console or code is sent, and secrets in options are masked (metrics/masking.py).
"""

import dataclasses
import importlib
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from config.errors import OptionError, first_line, install
from config.options import Options
from metrics.masking import mask, masked_options
from runtime.files import read_json, replace_text

IDS = "trackers.json"
PROJECT = "raw-trainer"  # unless the environment names another: WANDB_PROJECT, SWANLAB_PROJ_NAME
WAITING = 1000  # records that a tracker may be behind; it loses later ones
FINISH = {True: 30.0, False: 5.0}  # seconds for the last records: of a finished run, and of one that ends early

Rows = list[tuple[str, str]]  # prompt and the text that the model writes


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told at its start."""

    id: str
    name: str
    directory: Path
    config: dict[str, Any]
    step: int  # steps done before this start; above 0, the run is continued


class Tracker(Protocol):
    """A tracker that has started."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show numbers of a step."""

    def text(self, step: int, rows: Rows) -> None:
        """Show texts of the model as a table."""

    def finish(self, exit_code: int) -> None:
        """Write what is left, and the state of the run: 0, 128 + a signal that stopped it, or a failure."""


class TensorBoard:
    """Event files for `tensorboard --logdir`. A resumed run hides the values of later steps."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.step + 1 if run.step else None
        self.writer: Any = SummaryWriter(str(run.directory), purge_step=purge)
        rows = "".join(f"| {name} | {value} |\n" for name, value in run.config.items())
        self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", run.step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, rows: Rows) -> None:
        self.writer.add_text("samples", "\n\n".join(f"**{prompt}**{text}" for prompt, text in rows), step)

    def finish(self, exit_code: int) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in its directory, for `wandb sync`."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        run.directory.mkdir(parents=True, exist_ok=True)
        # Its metadata has the command line, its console what is printed, its git the changes to files.
        private = {"console": "off", "disable_git": True, "disable_code": True, "save_code": False}
        settings = wandb.Settings(x_disable_meta=True, x_save_requirements=False, **private)
        self.table = wandb.Table
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.directory.parent,  # in which wandb makes the directory wandb
            config=run.config,
            allow_val_change=True,  # a resumed run may have other options
            settings=settings,
        )
        # A resumed run repeats the steps after its checkpoint. wandb's own step may not go back, so it is not used. The
        # first definition that matches counts.
        self.run.define_metric("eval/*", step_metric="step", summary="min,last")  # the best, too
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def text(self, step: int, rows: Rows) -> None:
        self.run.log(
            {"step": step, "samples": self.table(columns=["prompt", "text"], data=[list(row) for row in rows])}
        )

    def finish(self, exit_code: int) -> None:
        if exit_code >= 128:
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)


class SwanLab:
    """A run of SwanLab. SWANLAB_MODE=offline keeps it in its directory, for `swanlab sync`."""

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        run.directory.mkdir(parents=True, exist_ok=True)
        kinds = swanlab.Settings
        self.as_text = swanlab.Text
        self.run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.directory),
            config=run.config,
            settings=kinds(  # its runtime has the command line, its terminal what is printed
                interactive=False,
                terminal=kinds.Terminal(proxy_type="none"),
                probe=kinds.Probe(runtime=False, requirements=False, git=False),
            ),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def text(self, step: int, rows: Rows) -> None:
        self.run.log({"samples": [self.as_text(text, caption=prompt) for prompt, text in rows]}, step=step)

    def finish(self, exit_code: int) -> None:
        state = "success" if exit_code == 0 else "aborted" if exit_code >= 128 else "crashed"
        self.run.finish(state=state, error=f"exit code {exit_code}" if state == "crashed" else None)


KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab}


class Trackers:
    """The trackers of a run, each with its thread. Rank 0 has it."""

    def __init__(self, options: Options, facts: dict[str, Any], step: int, say: Callable[[str], None]) -> None:
        """Prepare the trackers of a run that starts after `step` steps. `facts` are sent with the options.

        `say` prints a message above the progress bar. Raises OptionError if a package cannot be imported, and OSError
        if the ids cannot be written.
        """
        self.say = say
        self.workers: list[_Worker] = []
        names, output_dir = options.trackers, Path(options.output_dir)
        ids = _run_ids(output_dir / IDS, names, step, say)
        config = masked_options(options) | facts
        for name in names:
            _import(name)
            directory = Path(options.logging_dir or output_dir) / name
            run = TrackedRun(ids[name], mask(options.run_name or options.output_dir), directory, config, step)
            self.workers.append(_Worker(name, run, say))

    def start(self) -> None:
        """Start the threads. Only after the first batch: workers of the loader are forked, and would inherit locks."""
        for worker in self.workers:
            worker.start()

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Show a record. Its names are those of transformers: train/loss, eval/loss."""
        known = {name: value for name, value in values.items() if value is not None}
        evaluation = any(name.startswith("eval_") for name in known)
        shown = {
            f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in known.items()
            if name.startswith("eval_") or not evaluation
        }
        self._put(lambda tracker: tracker.log(step, shown))

    def text(self, step: int, rows: Rows) -> None:
        """Show what the model writes for each prompt, as a table."""
        self._put(lambda tracker: tracker.text(step, rows))

    def finish(self, exit_code: int) -> None:
        """Finish each tracker with the state of the run, within FINISH seconds for all of them."""
        self.start()
        for worker in self.workers:
            worker.put(lambda tracker: tracker.finish(exit_code), last=True)
        deadline = time.monotonic() + FINISH[exit_code == 0]
        for worker in self.workers:
            worker.join(deadline - time.monotonic())

    def _put(self, work: Callable[[Tracker], None]) -> None:
        for worker in self.workers:
            worker.put(work)


class _Worker:
    """The thread and the queue of one tracker. Its first failure is printed, and it does nothing more."""

    def __init__(self, name: str, run: TrackedRun, say: Callable[[str], None]) -> None:
        self.name, self.run, self.say = name, run, say
        self.queue: queue.Queue[tuple[Callable[[Tracker], None], bool]] = queue.Queue()
        self.thread: threading.Thread | None = None
        self.failed = False

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self.thread.start()

    def put(self, work: Callable[[Tracker], None], last: bool = False) -> None:
        """Ask for `work`, which the thread does when it comes to it. The caller does not wait."""
        if self.queue.qsize() >= WAITING and not last:
            self._fail(f"it is {WAITING} records behind")
        if not self.failed:
            self.queue.put((work, last))

    def join(self, seconds: float) -> None:
        """Wait until the last work is done, for at most so many seconds."""
        if self.thread and not self.failed:
            self.thread.join(max(0.0, seconds))
            if self.thread.is_alive():
                self._fail(f"its last records were not sent in time; its files are in {self.run.directory}")

    def _work(self) -> None:
        try:
            tracker, last = KINDS[self.name](self.run), False
            while not last and not self.failed:
                work, last = self.queue.get()
                work(tracker)
        except (Exception, SystemExit) as error:
            self._fail(mask(first_line(error)))

    def _fail(self, problem: str) -> None:
        if not self.failed:
            self.failed = True
            self.say(f"warning: report_to {self.name}: {problem}\nthe run continues without it; metrics.jsonl has all")


def _import(name: str) -> None:
    """Import a tracker's package: here, because it would meet other imports and forks in a thread."""
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except Exception as error:  # whatever its own dependencies raise
        raise OptionError(
            f"report_to {name}: it cannot be imported: {first_line(error)}\n"
            f"{install('--upgrade', name)}, or pass a --report_to without it"
        ) from error


def _run_ids(path: Path, names: list[str], step: int, say: Callable[[str], None]) -> dict[str, str]:
    """The id of the run in each tracker: that of the run which is resumed, or a new one. Writes them to `path`."""
    known: dict[str, str] = {}
    if step and path.exists():
        try:
            known = read_json(path, most=10_000)
            ids = known.values() if isinstance(known, dict) else [None]
            if not all(isinstance(id, str) and re.fullmatch(r"[\w-]{1,64}", id) for id in ids):
                raise ValueError("it does not hold ids of runs")
        except (OSError, ValueError) as error:
            known = {}
            say(f"warning: {path}: {first_line(error)}\nthe trackers begin a new run")
    new = uuid.uuid4().hex
    chosen = {name: os.environ.get(f"{name.upper()}_RUN_ID") or known.get(name) or new for name in names}
    replace_text(path, json.dumps(known | chosen) + "\n")
    return chosen
