"""The reports of a run: progress, metrics.jsonl, events.jsonl and trackers. Only rank 0 writes.

Each line of metrics.jsonl is a record, one JSON object; null stands for a number that is not finite. A record of
training comes every `logging_steps` optimizer steps:

    step               optimizer steps done, counted from 1
    epoch              passes over the training sequences: step / steps of one epoch; null for a stream
    tokens_seen        input tokens of all steps so far, over all ranks, without padding
    loss               of this step's global batch: nats per target token, or per pair (--objective dpo)
    grad_norm          L2 norm of this step's full gradient, before clipping
    learning_rate      of this step
    skipped_steps      steps so far that changed no parameter, because their gradient was not finite or their global
                       batch had no target
    tokens_per_second  input tokens of all ranks since the last record, per second of training; the seconds of
                       evaluations and checkpoints do not count
    mfu                model FLOPs (estimate/flops.py) per second, as a fraction of the peak of all GPUs; experts count
                       by the fraction that a token is sent to; null if the peak or the FLOPs are unknown
    peak_memory_gib    of rank 0 so far: allocated on its GPU, or resident on a CPU
    data_wait_seconds  in which rank 0 waited for micro-batches since the last record
    save_seconds       in which training waited for checkpoints since the last record: for the copy of the state, and
                       for the previous checkpoint to reach the disk
    slowest_rank       the rank that the others waited for longest since the last record; only with several ranks
    slowest_rank_lag   an estimate of the fraction of the time in which they did, from 0 to 1 (metrics/stragglers.py)

A mixture of experts has three more (loss/router.py), if transformers knows its routers:

    expert_load_max    largest number of tokens of an expert in this step, relative to the mean of its layer
    experts_unused     fraction of the experts without a token in this step
    router_aux_loss    the load-balancing loss, if it is part of the loss: the coefficient times it is in `loss`

A record of an evaluation:

    step, epoch, tokens_seen   as for training; step 0 is before training
    eval_loss                  nats per target token of all validation sequences; null if there is no target
    eval_perplexity            e to the power of eval_loss
    eval_bits_per_byte         bits of all targets per byte of their text in UTF-8; a special token (EOS) has bits and
                               no text; null if the tokenizer is of no kind that loss/token_bytes.py knows
    eval_tokens                target tokens evaluated

With --objective dpo, it has these instead of the last four:

    eval_loss                  nats per pair of all validation pairs; ln 2 = 0.693 if no answer is preferred
    eval_pairs                 pairs evaluated

With several validation sets (--validation_file code=a.jsonl,web=b.jsonl), each set has its own: eval_code_loss, ...

With --sample_prompts, each evaluation adds a record of what the model writes (loss/samples.py):

    step, epoch, tokens_seen   as for training
    samples                    a list of {"prompt": text, "completion": text}

events.jsonl has a record of each start (ranks, options, start block), trace, end and failure, with `time` in seconds
since 1970. A start that was killed has no end.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import nn
from tqdm import tqdm

from config.errors import OptionError, first_line, noting
from config.options import Options
from config.plan import Plan
from metrics.hardware import peak_flops, peak_memory_gib
from metrics.masking import masked_options
from metrics.records import drop_records_beyond
from metrics.stragglers import Stragglers
from metrics.trace import Trace
from metrics.trackers import Trackers
from runtime import ACTIVITY, TRAINING, WAITING_FOR_DATA, at_exit, collect_as_usual, collect_at_set_steps
from runtime.files import regular_file


class Recorder:
    """Writes the records of a run, and measures the time of training without evaluations and saves."""

    def __init__(
        self,
        options: Options,
        plan: Plan,
        rank: int,
        device: torch.device,
        flops_per_token: float | None,
    ) -> None:
        self.writes = rank == 0
        self.failures: list[OptionError] = []  # of writes; the loop tells the other ranks
        self.path = Path(options.output_dir) / "metrics.jsonl"
        self.device = device
        self.plan = plan
        self.objective = options.objective
        peak = peak_flops(device)
        # The fraction of the GPUs' peak that one token per second makes.
        self.mfu_per_speed = flops_per_token / (peak * dist.get_world_size()) if flops_per_token and peak else None
        self.tokens_seen = self.tokens_at_last_record = self.step_at_last_record = self.steps_done = 0
        self.waited = self.evaluating = self.saving = 0.0
        self.started = time.perf_counter()
        self.activity = ACTIVITY
        # In a log file, every redraw of a bar would be a new line.
        no_bar = not sys.stderr.isatty() if options.disable_tqdm is None else options.disable_tqdm
        self.bar = tqdm(total=plan.total_steps, unit="step", disable=no_bar or not self.writes, dynamic_ncols=True)
        self.options = options
        self.trackers: Trackers | None = None
        traces = options.trace_steps and self.writes
        self.trace = Trace(options.trace_steps, self.path.parent, self.failures) if traces else None

    def start(
        self,
        description: str,
        step: int,
        tokens_seen: int,
        evaluation_due: bool,
        wrapped: nn.Module,
        layers: list[nn.Module],
    ) -> None:
        """Print the start block and begin after `step` steps, whose evaluation may be due.

        Later records, which an interrupted run has left, are removed.
        The forward passes of `wrapped` count as micro-steps, for the report of a hang (runtime/hang/watch.py). The
        decoder `layers` are timed, to find a slow rank.
        """
        self.print(description)
        self.stragglers = Stragglers(layers, self.device)
        wrapped.register_forward_pre_hook(self._micro_step)
        self.steps_done = self.activity.step = step
        self.first_step = step + 1
        self.activity.micro_steps = self.plan.accumulation
        self.tokens_seen = self.tokens_at_last_record = tokens_seen
        self.step_at_last_record = step
        self.bar.initial = self.bar.n = self.bar.last_print_n = step  # earlier steps do not count for the speed
        self.bar.unpause()
        if step >= self.plan.total_steps > 0:
            self.print(f"step {step} of {self.plan.total_steps}: the run is complete; raise --max_steps to train on")
        self.started = time.perf_counter()
        if self.writes:
            with noting(self.failures, self.path):
                drop_records_beyond(self.path, step, evaluation_due)
            if self.options.trackers:
                with noting(self.failures, self.path.parent):
                    self.trackers = Trackers(self.options, self._facts(), step, self._warn)
                    at_exit(self.trackers.finish)
            ranks, options = dist.get_world_size(), masked_options(self.options)
            plan = {"ranks": ranks, "total_steps": self.plan.total_steps, "options": options}
            self._event("start", **plan, description=description)
            self.activity.report_failure = lambda message: self._event("failure", message=message)
        if self.trace:
            self.trace.start(step)

    def timed(self, batches: Iterable[Any]) -> Generator[Any]:
        """Yield `batches`, and measure the time to get each."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            self.activity.step, self.activity.phase = self.steps_done + 1, WAITING_FOR_DATA
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.activity.phase = TRAINING
            self.waited += time.perf_counter() - before
            yield batch

    @contextlib.contextmanager
    def pause(self, to: Literal["evaluate", "save"]) -> Iterator[None]:
        """Stop the clock of training. Waits for the steps that the GPU still computes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = time.perf_counter()
        self.activity.phase, phase = "evaluation" if to == "evaluate" else to, self.activity.phase
        yield
        self.activity.phase = phase
        if to == "evaluate":
            self.evaluating += time.perf_counter() - before
        else:
            self.saving += time.perf_counter() - before

    def step(self, tokens: int) -> None:
        """Count a step of `tokens` input tokens over all ranks. The CPU does not synchronize with the GPU.

        Every rank must call, because Python's garbage is collected here, at set steps.
        """
        self.tokens_seen += tokens
        self.steps_done, self.activity.micro_step = self.steps_done + 1, 0
        self.bar.update(1)
        collect_at_set_steps(self.steps_done, self.first_step)
        if self.trackers:
            self.trackers.start()
        if self.trace and (report := self.trace.step()):
            self.print(report)
            self._event("trace", **self.trace.summary)

    def log(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        skipped_steps: int,
        router: dict[str, float],
    ) -> None:
        """Write a record of training. The caller has read the floats from the device, so the step is complete.

        Every rank must call, because they gather their times, in a millisecond.
        `router` has the fields of a mixture of experts (loss/router.py).
        """
        now = time.perf_counter()
        seconds = now - self.started - self.evaluating - self.saving
        speed = (self.tokens_seen - self.tokens_at_last_record) / seconds
        self._write(
            step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped_steps=skipped_steps,
            tokens_per_second=speed,
            mfu=speed * self.mfu_per_speed if self.mfu_per_speed else None,
            peak_memory_gib=peak_memory_gib(self.device),
            data_wait_seconds=self.waited,
            save_seconds=self.saving,
            **router,
            **self.stragglers.gather(seconds, self.waited),
        )
        if report := self.stragglers.report():
            self.print(f"step {step}: {report}")
        progress = f"loss {loss:.3f}, lr {learning_rate:.2e}, {speed:,.0f} tokens/s"
        if self.bar.disable:
            total = self.plan.total_steps
            left = timedelta(seconds=round((total - step) * seconds / max(step - self.step_at_last_record, 1)))
            self.print(f"step {step}/{total}: {progress}, {left} left")
        else:
            self.bar.set_postfix_str(progress)
        self.started, self.tokens_at_last_record, self.step_at_last_record = now, self.tokens_seen, step
        self.waited = self.evaluating = self.saving = 0.0

    def evaluation(self, step: int, metrics: dict[str, float] | None) -> None:
        """Write a record of an evaluation: the metrics of all validation sets, by name; no record without any.

        None: a signal has ended it.
        """
        if metrics is None:
            self.print(f"step {step}: a signal ended the evaluation; the resumed run begins with it")
        if not metrics:
            return
        self._write(step, **metrics)
        for name in (name.removesuffix("_loss") for name in metrics if name.endswith("_loss")):
            line = f"step {step}: validation{name[4:].replace('_', ' ', 1)} loss {metrics[f'{name}_loss']:.4f}"
            if self.objective == "dpo":
                self.print(f"{line}, {metrics[f'{name}_pairs']:,} pairs")
                continue
            perplexity, bits = metrics[f"{name}_perplexity"], metrics[f"{name}_bits_per_byte"]
            known = "" if math.isnan(bits) else f", {bits:.3f} bits per byte"
            self.print(f"{line}, perplexity {perplexity:,.2f}{known}, {metrics[f'{name}_tokens']:,} tokens")

    def samples(self, samples: list[dict[str, str]]) -> None:
        """Write a record of what the model writes at this step, and print it, a line for each prompt."""
        self._append(self.steps_done, {"samples": samples})
        if self.trackers:
            self.trackers.text(self.steps_done, [(sample["prompt"], sample["completion"]) for sample in samples])
        for sample in samples:  # as literals, because a control character could write over a terminal
            self.print(f"step {self.steps_done}: {sample['prompt'][:60]!r} -> {sample['completion']!r}")

    def print(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self.writes:
            with noting(self.failures, Path("stdout")):  # perhaps a file, on a full disk
                self.bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    def close(self, finished: bool) -> None:
        """Close the progress bar, end what `step` has begun, and write the report if --report asks for it."""
        collect_as_usual()
        if self.trace and not self.trace.done:
            self.print(f"trace_steps {self.trace.steps}: the run ended before these steps; no trace was written")
        self.bar.close()
        early = self.steps_done < self.plan.total_steps
        self._event("end", reason=("stopped early" if early else "finished") if finished else "stopped by a signal")
        self.activity.report_failure = None
        if self.options.report and self.writes:
            self.print(_report(self.path.parent))

    def _micro_step(self, *_: object) -> None:
        if torch.is_grad_enabled():
            self.activity.micro_step += 1

    def _write(self, step: int, **values: Any) -> None:
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        self._append(step, values)
        if self.trackers:
            self.trackers.log(step, {**self._place(step), **values})

    def _append(self, step: int, values: dict[str, Any]) -> None:
        if self.writes:
            record = {"step": step, **self._place(step), **values}
            with noting(self.failures, self.path), open(self.path, "a", opener=regular_file) as file:
                file.write(json.dumps(record) + "\n")

    def _place(self, step: int) -> dict[str, float | None]:
        epoch = step / self.plan.steps_per_epoch if self.plan.steps_per_epoch else None
        return {"epoch": epoch, "tokens_seen": self.tokens_seen}

    def _event(self, event: str, **facts: Any) -> None:
        """Write a record to events.jsonl. Unlike metrics.jsonl, it keeps what a resumed run has replaced."""
        if self.writes:
            path = self.path.with_name("events.jsonl")
            record = {"event": event, "time": time.time(), "step": self.steps_done, **facts}
            with noting(self.failures, path), open(path, "a", opener=regular_file) as file:
                file.write(json.dumps(record) + "\n")

    def _facts(self) -> dict[str, Any]:
        """What trackers get with the options: the plan, the machine and the versions."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        versions = {"torch_version": torch.__version__, "transformers_version": transformers.__version__}
        plan = {name: value for name, value in dataclasses.asdict(self.plan).items() if isinstance(value, int | float)}
        return {**plan, "world_size": dist.get_world_size(), "gpu": gpu, **versions}

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.bar.write(text, file=sys.stderr)
            sys.stderr.flush()


def _report(output_dir: Path) -> str:
    """Write the report, and return the path of it in words. Whatever goes wrong is said, and does not end the run."""
    try:
        from metrics.report import PAGE, write_report

        (page,) = write_report([output_dir], output_dir / PAGE)
        return f"wrote {page}"
    except Exception as error:
        command = f"python -m metrics.report {output_dir}"
        return f"report true: it could not be written: {first_line(error)}; run {command}"
