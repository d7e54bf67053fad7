"""What a run tells: the start block, the progress bar, metrics.jsonl and TensorBoard. Only rank 0 writes.

metrics.jsonl holds one JSON object a line; null stands for a number that is not finite. Rows of training, every
`logging_steps` optimizer steps:

    step               optimizer steps done, counted from 1
    epoch              passes over the training rows: step / steps of one epoch; null for a stream
    tokens_seen        input tokens of all steps so far, over all ranks, without padding
    loss               of this step's global batch: nats per target token, or per pair (--objective dpo)
    grad_norm          L2 norm of this step's full gradient, before clipping
    learning_rate      of this step
    skipped_steps      steps so far that changed no parameter, because their gradient was not finite or their global
                       batch had no target
    tokens_per_second  input tokens of all ranks since the last row, per second of training: evaluations and
                       checkpoints are not counted in
    mfu                model FLOPs (model/loss.py says which) per second over the peak of all GPUs; null where
                       the peak is not known
    peak_memory_gib    of rank 0 so far: allocated on its GPU, or resident on a CPU
    data_wait_seconds  that rank 0 stood waiting for its micro-batches since the last row
    save_seconds       that training stood still for checkpoints since the last row: while the state was copied, and
                       while the checkpoint before was not yet on the disk

Rows of evaluations:

    step, epoch, tokens_seen   as above; step 0 is before training
    eval_loss                  nats per target token of all validation rows
    eval_perplexity            e to the power of eval_loss
    eval_tokens                target tokens evaluated

and with --objective dpo, in the place of the last three:

    eval_loss                  nats per pair of all validation rows; ln 2 = 0.693 where no answer is preferred
    eval_pairs                 pairs evaluated
"""

import collections
import contextlib
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel

from config import Options, Plan, rate_factor, readers
from data.rows import Data
from model.memory import stage_name
from model.weights import Weights

# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets of these products; the first name that matches counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}


COLLECTIVES = {
    "c10d::allreduce_": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
}


class Recorder:
    """Writes the rows of a run and keeps its clock: time that is not training does not count as training."""

    def __init__(
        self,
        options: Options,
        plan: Plan,
        rank: int,
        device: torch.device,
        flops_per_token: float | None,
    ) -> None:
        self.writes = rank == 0
        self.path = Path(options.output_dir) / "metrics.jsonl"
        self.device = device
        self.plan = plan
        self.objective = options.objective
        peak = peak_flops(device)
        # The share of the GPUs' peak that one token per second makes.
        self.mfu_per_speed = flops_per_token / (peak * dist.get_world_size()) if flops_per_token and peak else None
        self.tokens_seen = self.tokens_at_last_row = 0
        self.waited = self.evaluating = self.saving = 0.0
        self.started = time.perf_counter()
        self.bar = tqdm(total=plan.total_steps, unit="step", disable=not self.writes, dynamic_ncols=True, leave=True)
        self.board = _tensorboard(self.path.parent) if options.report_to == "tensorboard" and self.writes else None
        self.trace = Trace(options.trace_steps, self.path.parent) if options.trace_steps and self.writes else None

    def start(self, step: int, tokens_seen: int) -> None:
        """Begin after `step` steps: rows beyond it, left by a run that was cut off, are dropped."""
        self.tokens_seen = self.tokens_at_last_row = tokens_seen
        self.bar.initial = self.bar.n = self.bar.last_print_n = step  # the steps of an earlier run are no speed
        self.bar.unpause()
        self.started = time.perf_counter()
        if self.writes:
            drop_rows_beyond(self.path, step)
        if self.trace:
            self.trace.start(step)

    def timed(self, batches: Iterable[Any]) -> Generator[Any]:
        """The same batches, with a watch on the time that it takes to get them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield batch

    @contextlib.contextmanager
    def pause(self, to: Literal["evaluate", "save"]) -> Iterator[None]:
        """Stop the clock of training. On a GPU this waits for the steps that are still running there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = time.perf_counter()
        yield
        if to == "evaluate":
            self.evaluating += time.perf_counter() - before
        else:
            self.saving += time.perf_counter() - before

    def step(self, tokens: int) -> None:
        """Count a step of `tokens` input tokens over all ranks. Costs no synchronisation."""
        self.tokens_seen += tokens
        self.bar.update(1)
        if self.trace and (report := self.trace.step()):
            self.say(report)

    def log(self, step: int, loss: float, grad_norm: float, learning_rate: float, skipped_steps: int) -> None:
        """Write a row of training; the floats must have been read from the device, so that its work is done."""
        now = time.perf_counter()
        speed = (self.tokens_seen - self.tokens_at_last_row) / (now - self.started - self.evaluating - self.saving)
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
        )
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.2e}, {speed:,.0f} tokens/s")
        self.started, self.tokens_at_last_row = now, self.tokens_seen
        self.waited = self.evaluating = self.saving = 0.0

    def evaluation(self, step: int, loss: float, targets: int) -> None:
        """Write a row of evaluation."""
        if self.objective == "dpo":
            self._write(step, eval_loss=loss, eval_pairs=targets)
            self.say(f"step {step}: validation loss {loss:.4f}, {targets:,} pairs")
            return
        perplexity = math.exp(min(loss, 700.0))
        self._write(step, eval_loss=loss, eval_perplexity=perplexity, eval_tokens=targets)
        self.say(f"step {step}: validation loss {loss:.4f}, perplexity {perplexity:,.2f}, {targets:,} tokens")

    def say(self, text: str) -> None:
        """A line for people, above the progress bar; from rank 0 only."""
        if self.writes:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.trace and not self.trace.done:
            self.say(f"trace_steps {self.trace.steps}: the run has ended before they were done; nothing was written")
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _write(self, step: int, **values: Any) -> None:
        if not self.writes:
            return
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        epoch = step / self.plan.steps_per_epoch if self.plan.steps_per_epoch else None
        row = {"step": step, "epoch": epoch, "tokens_seen": self.tokens_seen, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)


class Trace:
    """A torch profiler that records some steps of rank 0, and says which collectives they had.

    The first two steps of a run, in which layers are compiled and DDP finds the order of its buckets, are left out; the
    next `steps` are recorded, each from the end of the one before: its batch, forward, backward and update. What is
    recorded costs time, so that the speed of these steps means little.
    """

    WARMUP = 2

    def __init__(self, steps: int, output_dir: Path) -> None:
        self.steps = steps
        self.folder = output_dir / "trace"
        self.report = ""
        self.done = False
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=self.WARMUP, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def start(self, step: int) -> None:
        """Begin after `step` steps."""
        self.first = step + self.WARMUP + 1
        self.profiler.start()

    def step(self) -> str:
        """Call after each step; gives the report, once, after the last that is recorded."""
        self.profiler.step()
        report, self.report = self.report, ""
        return report

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.done = True
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps-{self.first}-{self.first + self.steps - 1}.json"
        profiler.export_chrome_trace(str(path))
        lines = [
            f"  {kind:<15}{count / self.steps:>9,g} with {size / self.steps:>17,.0f} bytes"
            for kind, (count, size) in sorted(collectives(profiler).items())
        ]
        self.report = "\n".join([f"traced {path}; collectives of a step:", *lines])


def collectives(profiler: torch.profiler.profile) -> dict[str, tuple[int, int]]:
    """How many collectives of each kind a profile has, and the bytes of the whole tensors that they are about.

    They are torch's own operators, whoever calls them: DDP from C++, FSDP, or the loop. A gather has its result among
    its arguments, a reduce-scatter what is reduced: the larger one is the whole.
    """
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    assert profiler.profiler
    results: Any = profiler.profiler.kineto_results
    waiting = list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name not in COLLECTIVES:
            continue
        kind = COLLECTIVES[event.name]
        calls, size = found[kind]
        found[kind] = (calls + 1, size + max(map(_bytes, event.extra_fields.inputs)))
    return found


def _bytes(argument: Any) -> int:
    """Of an operator's argument, as the profiler describes it: a tensor, a list of them, or something else."""
    tensors = [entry for entry in (argument if isinstance(argument, list) else [argument]) if hasattr(entry, "sizes")]
    return sum(math.prod(tensor.sizes) * tensor.dtype.itemsize for tensor in tensors)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that a killed process left unfinished is not one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def drop_rows_beyond(path: Path, step: int) -> None:
    """Leave only the rows of the first `step` steps, and none at 0, in a file that is then there whole or as before."""
    kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(beside, path)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s by its data sheet, where it is in PEAK_FLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for product, peak in PEAK_FLOPS.items() if re.search(rf"\b{product}\b", name)), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has had: allocated on its GPU by torch, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def gpu_memory(device: torch.device) -> int | None:
    """Bytes that this rank has of its GPU, which ranks of a host may share; None on a CPU."""
    if device.type != "cuda":
        return None
    sharing = math.ceil(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / torch.cuda.device_count())
    return int(torch.cuda.get_device_properties(device).total_memory) // sharing


def _tensorboard(output_dir: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # optional: not among the requirements

    return SummaryWriter(str(output_dir / "tensorboard"))


def dtype_names(tensors: Iterable[Any]) -> str:
    """The dtypes that occur among tensors, on the disk or in memory."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def start_block(
    options: Options,
    plan: Plan,
    data: Data,
    model: PreTrainedModel,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    resumed_from: Path | None,
    memory: str,
) -> str:
    """What is about to run, as lines for people; `memory` is what model/memory.py foresees."""
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = list(model.parameters())
    masters = dtype_names(parameters)
    files = dtype_names(stored for source in weights.values() for part in source.stored.values() for stored in part)
    compute = "bfloat16" if options.bf16 else masters
    compute += ", what layers are given, too" * options.bf16_residual
    compute += ", matrix products of layers float8" * options.float8 + ", layers compiled" * options.torch_compile
    epoch = f"{plan.steps_per_epoch:,}" if plan.steps_per_epoch else "an unknown number"
    tokens = plan.global_batch_size * row_tokens(data, plan.block_size)
    micro_batch = options.per_device_train_batch_size
    lines = {
        "ranks": f"{ranks} on {name}, backend {dist.get_backend()}",
        "strategy": f"{stage_name(options)}: {sharded(options, ranks)}",
        "model": f"{type(model).__name__.removeprefix('FSDP')}, {sum(p.numel() for p in parameters):,} parameters",
        "weights": f"{files} in the files of {options.model_name_or_path}" if weights else "random",
        "dtypes": f"parameters {masters}, gradients {masters}, optimizer state {masters}; compute {compute}",
        "activations": activations_line(options),
        "memory": memory,
        **data_lines(data, plan.block_size),
        "objective": f"dpo, held to the model as it begins with beta {options.dpo_beta}"
        if options.objective == "dpo"
        else "next token",
        "global batch": f"{micro_batch} rows x {plan.accumulation} micro-steps x "
        f"{readers(options, ranks // options.ranks_a_row)} = "
        f"{plan.global_batch_size} rows, up to {tokens:,} tokens",
        "optimizer": optimizer_line(optimizer),
        "learning rate": learning_rate_line(options, plan.global_batch_size),
        "steps": f"{plan.total_steps:,}, {epoch} an epoch, up to {plan.total_steps * tokens:,} tokens",
        "output": str(options.output_dir),
        "start": f"resumed from {resumed_from}" if resumed_from else "from the beginning",
    }
    return "\n".join(f"{key:<13} {value}" for key, value in lines.items())


def sharded(options: Options, ranks: int) -> str:
    """What each rank has a part of, and what it has whole."""
    more = [f"each row divided among {options.context_parallel} of them"] if options.context_parallel > 1 else []
    if options.strategy == "ddp":
        moments = f"moments sharded over {ranks} ranks; " if options.shard_optimizer else ""
        return ", ".join([f"{moments}each rank holds parameters{'' if moments else ', moments'} and gradients", *more])
    if not options.reshard_after_forward:
        more.append("parameters whole until gradients are exchanged")
    if options.gradient_accumulation_steps > 1 and not options.sync_each_batch:
        more.append("gradients whole between micro-steps")
    if options.tensor_parallel > 1:
        more.append(f"each layer divided among {options.tensor_parallel} of them")
    if options.cpu_offload:
        more.append("shards and optimizer in host memory")
    shards = f"parameters, gradients and moments sharded over {ranks // options.replicas} ranks"
    return ", ".join([shards, *more])


def activations_line(options: Options) -> str:
    """What the layers keep of a forward for its backward."""
    if options.gradient_checkpointing:
        where = ", in host memory" if options.offload_activations else ""
        return f"only the input of each layer{where}; the rest is computed again"
    if options.activation_memory_budget is not None:
        return f"{options.activation_memory_budget:.0%} of each layer's; the rest is computed again"
    return "kept"


def optimizer_line(optimizer: torch.optim.Optimizer) -> str:
    """Which parameters are updated how."""
    muon = [group for group in optimizer.param_groups if "momentum" in group]
    if not muon:
        return "AdamW"
    elements = sum(parameter.numel() for group in muon for parameter in group["params"])
    return f"Muon for {elements:,} parameters in matrices of the decoder layers, AdamW for all others"


def learning_rate_line(options: Options, rows: int) -> str:
    """The highest rate, and how it follows from the one that was given, for a global batch of `rows`."""
    if options.scale_learning_rate == "none":
        return f"{options.learning_rate:g}, whatever the global batch"
    given = options.learning_rate / rate_factor(options, rows)
    ratio = f"{rows} / {options.reference_batch_size} rows"
    return f"{options.learning_rate:g} = {given:g} x {'sqrt' if options.scale_learning_rate == 'sqrt' else ''}({ratio})"


def row_tokens(data: Data, block_size: int) -> int:
    """The slots of a row: a pair has two sequences."""
    return block_size * (2 if data.packing == "pairs" else 1)


def data_lines(data: Data, block_size: int) -> dict[str, str]:
    """What was prepared, for the start block and for data/prepare.py."""
    held_out = data.counts.get("validation")
    validation = f"{held_out.documents:,} documents, {held_out.rows:,} rows" if held_out else "none"
    if "train" not in data.counts:
        rows = f"of up to {block_size} tokens, packing {data.packing}"
        return {"tokenizer": data.tokenizer, "data": data.source, "rows": rows, "validation": validation}
    train, slots = data.counts["train"], row_tokens(data, block_size)
    lines = {
        "tokenizer": data.tokenizer,
        "data": f"{data.source}: {train.documents:,} documents ({train.shape}), {train.tokens:,} tokens, "
        f"{train.learned_tokens / train.tokens:.1%} of them learned",
        "left out": f"{train.empty_documents} empty documents, {train.targetless_documents} with nothing to learn, "
        f"what {train.cut_documents} documents had beyond a row, {train.dropped_tokens} tokens of a last partial row",
        "rows": f"{train.rows:,} of {slots} tokens, packing {data.packing}, "
        f"{train.filled(slots):.2%} of their slots used",
        "validation": validation,
    }
    if len(data.train.sources) > 1:
        drawn = [f"{quota:,} from {rows:,} rows" for rows, quota in data.train.sources]
        lines["mixture"] = f"an epoch draws {', '.join(drawn)}"
    return lines
