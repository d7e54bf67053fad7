"""Save a checkpoint: atomic, without pickle, and independent of the number of ranks and the strategy.

    output_dir/checkpoint-STEP/
        model/shard-*.safetensors      fp32 parameters, or adapters alone; each rank writes its shards
        optimizer/shard-*.safetensors  two moments of each parameter, fp32 or bf16; one where Muon updates
        state.json                     step, data cursor, RNG of every rank, fingerprints, options, versions
        manifest.json                  size and SHA-256 of every other file, written last

A checkpoint is written into a temporary directory, synced to the disk and renamed, so it is never visible half written.
All ranks must see the same output directory.
"""

import dataclasses
import json
import platform
import shutil
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from checkpoint.files import MANIFEST, fsync, fsync_and_hash, prune
from checkpoint.identity import Progress, RunIdentity
from checkpoint.ranks import broadcast_object, gather_objects, raise_together, run_together
from checkpoint.rng import rng_state
from checkpoint.state import optimizer_state, tensors_to_write
from config.errors import OptionError
from config.options import Options
from model.export import checkpoint_tensors


@dataclasses.dataclass
class Snapshot:
    """The contribution of one rank to a checkpoint."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    rng: dict[str, str]
    state: dict[str, Any]  # the rest of state.json, the same on all ranks


class Saver:
    """Writes checkpoints in a thread, from a copy, while training continues. Every rank has one and calls it equally.

    The thread's collectives use their own process group, because they must not mix with the collectives of the loop.
    """

    def __init__(self, options: Options, *failures: list[OptionError]) -> None:
        """Make a saver, with lists of `failures` to write other files of the run. This rank adds to them."""
        self.options, self.failures = options, failures
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=options.ddp_timeout))
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[None] | None = None
        self.copies: dict[str, Tensor] = {}

    def save(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Progress, identity: RunIdentity
    ) -> None:
        """Write checkpoint-STEP, then remove the oldest ones beyond `save_total_limit`, but not the best.

        Waits for the previous checkpoint and for the copy. With `async_save` false it waits for the files, too, and
        needs no copy (12 bytes per parameter over all ranks, 8 with bf16 moments). Raises OptionError on all ranks if
        one cannot write.
        """
        self.wait()
        moments, optimizer_steps = optimizer_state(optimizer)
        snapshot = Snapshot(
            tensors_to_write(checkpoint_tensors(model)),
            tensors_to_write(moments),
            rng_state(),
            {
                "progress": dataclasses.asdict(progress) | dataclasses.asdict(identity),
                "optimizer_steps": optimizer_steps,
                "options": dataclasses.asdict(self.options),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
        )
        if self.options.async_save:
            snapshot.parameters = self._copy(snapshot.parameters)
            snapshot.moments = self._copy(snapshot.moments)
        self.writing = self.thread.submit(_write, snapshot, self.options, self.group)
        if not self.options.async_save:
            self.wait()

    def failed(self) -> bool:
        """Whether this rank cannot write a file. The ranks must agree on it, and then all call `wait`."""
        unsaved = self.writing is not None and self.writing.done() and self.writing.exception() is not None
        return unsaved or any(self.failures)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises OptionError on all ranks if one cannot write a file."""
        try:
            if self.writing:
                self.writing.result()
        except (OSError, dcp.CheckpointException) as error:
            failures = getattr(error, "failures", {0: (error, None)})
            causes = {str(cause) for cause, _ in failures.values() if isinstance(cause, OSError)}
            if not causes:
                raise
            raise OptionError(
                f"output_dir {self.options.output_dir}: the checkpoint could not be written: {min(causes)[:200]}\n"
                "make room or pass another directory; the previous checkpoint is intact: --resume_from_checkpoint auto"
            ) from error
        self.writing = None
        failures = gather_objects([str(failure) for failures in self.failures for failure in failures])
        if any(failures):
            raise OptionError(next(filter(None, failures))[0])

    def fail(self, other: OptionError | None) -> None:
        """Wait as `wait` does, then raise the `other` error of any rank on all ranks. Every rank must call."""
        self.wait()
        raise_together(other)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors in host memory: page-locked for fast GPU copies, and reused by the next save."""
        for name, tensor in tensors.items():
            if name not in self.copies:
                self.copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self.copies[name] for name in tensors}


def _write(snapshot: Snapshot, options: Options, group: dist.ProcessGroup) -> None:
    """Write, sync and rename a checkpoint, then prune. Every rank must call. Raises OSError on all if one fails."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    output_dir = Path(options.output_dir)
    final = output_dir / f"checkpoint-{snapshot.state['progress']['step']}"
    saving = output_dir / broadcast_object(f".saving-{uuid.uuid4().hex}", group)
    rng = gather_objects(snapshot.rng, group)

    def write_state() -> None:
        saving.mkdir(exist_ok=True)
        if rank == 0:
            (saving / "state.json").write_text(json.dumps(snapshot.state | {"rng": rng}, indent=1))

    def sync() -> dict[str, Any]:
        files = sorted(path for path in saving.rglob("*") if path.is_file())
        return {str(path.relative_to(saving)): fsync_and_hash(path) for path in files[rank::world_size]}

    def complete() -> None:
        if rank > 0:
            return
        manifest = {name: digest for part in digests for name, digest in part.items()}
        (saving / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        fsync_and_hash(saving / MANIFEST)
        for directory in (saving / "model", saving / "optimizer", saving):
            fsync(directory)
        saving.rename(final)
        fsync(output_dir)
        prune(output_dir, options.save_total_limit, snapshot.state["progress"]["best"]["step"])

    try:
        run_together(write_state, group)
        for name, tensors in (("model", snapshot.parameters), ("optimizer", snapshot.moments)):
            writer = dcp.HuggingFaceStorageWriter(str(saving / name), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group)
        digests = run_together(sync, group)
        run_together(complete, group)
    except (OSError, dcp.CheckpointException):  # on all ranks, so no rank still writes
        if rank == 0:
            shutil.rmtree(saving, ignore_errors=True)  # a full disk has room again
        raise
