"""The identity of a run: what must be equal on all ranks, and what a resumed run must not change."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from checkpoint.files import MOST_JSON, STATE
from checkpoint.output_dir import require_shared
from checkpoint.ranks import broadcast_object, gather_objects
from checkpoint.rng import is_rng_state
from config.errors import OptionError
from config.options import MAY_DIFFER_BETWEEN_NODES, Options
from config.plan import Plan
from model.adapters import adapted_modules
from model.weights import Weights, files_of, fingerprint_files
from runtime.files import read_json


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What a run is: equal on all ranks, and unchanged when it resumes.

    Each field carries the remedy for a resume that differs in it; `{}` stands for the value of the checkpoint.
    """

    model_fingerprint: str = dataclasses.field(
        metadata={
            "remedy": "resume with the model that was trained (with use_peft: its files, and the lora_target_modules "
            "of that run)"
        }
    )
    data_fingerprint: str = dataclasses.field(
        metadata={"remedy": "resume with the data, tokenizer, block_size, packing (and dpo's reference) of that run"}
    )
    seed: int = dataclasses.field(metadata={"remedy": "pass --seed {}"})
    # In sequences, over all ranks. With step and seed it gives the place in the data.
    global_batch_size: int = dataclasses.field(metadata={"remedy": "pass --global_batch_size {}"})
    optim: str = dataclasses.field(metadata={"remedy": "pass --optim {}"})  # whose moments a checkpoint holds


@dataclasses.dataclass
class Best:
    """The best evaluations so far, by a metric that is better when it is lower (checkpoint/best.py)."""

    metric: str | None = None
    step: int = 0  # of the best checkpoint; 0: no checkpoint was evaluated yet
    value: float | None = None  # of the metric at that step
    lowest: float | None = None  # value of all evaluations, also at steps without a checkpoint
    without_improvement: int = 0  # evaluations in a row, up to now


@dataclasses.dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    tokens_seen: int = 0  # input tokens of those steps, over all ranks
    skipped_steps: int = 0  # steps among them that changed nothing, because their gradient was not usable
    # The last sequences of a stream (data/stream.py).
    cursor: list[list[int]] = dataclasses.field(default_factory=list)
    learning_rate: float | None = None  # of this step
    best: Best = dataclasses.field(default_factory=Best)
    evaluation_due: bool = False  # the evaluation after this step comes first, because a signal ended it


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json. Raises OSError; ValueError unless each value is one that a run saves.

    A checkpoint of an older version may lack fields of Progress that have a default; one of a newer version has fields
    that are unknown here, and is refused.
    """
    state = read_json(path / STATE, MOST_JSON)

    def require(fits: bool, name: str) -> None:
        if not fits:
            raise ValueError(f"{path / STATE}: {name} is not what a run saves")

    keys = {"progress", "optimizer_steps", "options", "versions", "rng"}
    require(isinstance(state, dict) and state.keys() == keys, "the list of its entries")
    progress, best = state["progress"], {}
    for name in ("progress", "optimizer_steps", "options", "versions"):
        require(isinstance(state[name], dict), name)
    types = {field.name: field.type for field in dataclasses.fields(Progress)}
    identity = {field.name for field in dataclasses.fields(RunIdentity)}  # compared with the values of this run
    require(identity | {"step", "tokens_seen"} <= progress.keys() <= identity | types.keys(), "the list of progress")
    for name, value in progress.items():
        if name in identity:
            require(isinstance(value, str | int) and len(str(value)) <= 100, f"progress.{name}")
        elif name == "best":
            best = value
        elif name == "cursor":
            require(isinstance(value, list) and all(map(_is_place, value)), "progress.cursor")
        else:
            require(_fits(value, types[name]), f"progress.{name}")
    types = {field.name: field.type for field in dataclasses.fields(Best)}
    require(isinstance(best, dict) and best.keys() <= types.keys(), "progress.best")
    for name, value in best.items():
        require(_fits(value, types[name]), f"progress.best.{name}")
    for name, value in state["optimizer_steps"].items():
        require(_fits(value, float) and 0 <= value < 2**63, f"optimizer_steps of {name[:100]}")
    rng = state["rng"]
    require(isinstance(rng, list) and len(rng) > 0 and all(map(is_rng_state, rng)), "rng")
    return state


def _is_place(value: Any) -> bool:
    """Whether a JSON value is a place of a lane in a stream (data/stream.py), whose numbers have at most 43 bits."""
    return isinstance(value, list) and len(value) > 4 and all(_fits(part, int) and part < 2**43 for part in value)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the type of a field. Numbers are finite, and integers from 0 to 2^63 - 1."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, int):
        return 0 <= value < 2**63 and (isinstance(value, kind) or isinstance(0.0, kind))
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))


def identify_run(
    options: Options, plan: Plan, data_fingerprint: str, model: PreTrainedModel, weights: Weights
) -> RunIdentity:
    """The identity of the run that `options` describe. `model` may be on the meta device, wrapped or sharded.

    A checkpoint of adapters lacks the frozen model, so its identity depends on samples of the model's files (`weights`)
    and on the scale of the adapters.
    """
    scales = sorted({module.scaling for module in adapted_modules(model).values()})
    return RunIdentity(
        model_fingerprint=fingerprint_model(model, [*scales, fingerprint_files(files_of(weights))] if scales else []),
        data_fingerprint=data_fingerprint,
        seed=options.seed,
        global_batch_size=plan.global_batch_size,
        optim=options.optim,
    )


def fingerprint_model(model: PreTrainedModel, more: list[Any]) -> str:
    """SHA-256 over the names and shapes of all parameters, and `more`; sharding does not change it."""
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()] + more
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def fingerprint_weights(model: PreTrainedModel) -> str:
    """SHA-256 over the values of all parameters; the topology does not change it. Every rank must call.

    Costs an all-gather of each parameter, over gloo, and on rank 0 a second for every 2 GB.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu()
        if isinstance(values, DTensor):
            values = values.full_tensor()  # a collective; with GPU tensors, gloo's crashes in torch 2.11
        if dist.get_rank() == 0:
            digest.update(name.encode())
            digest.update(values.numpy().tobytes())
    return broadcast_object(digest.hexdigest())


def require_same_run(options: Options, identity: RunIdentity, weights: Weights, config: PretrainedConfig) -> None:
    """Refuse ranks that were given different runs, models, weights or output directories. Every rank must call.

    All options must be equal but those in MAY_DIFFER_BETWEEN_NODES. Otherwise ranks would wait for each other in
    different collectives, train on other sequences than they should, or write a checkpoint that no node has in full.
    Raises OptionError on every rank.
    """
    run = {name: value for name, value in dataclasses.asdict(options).items() if name not in MAY_DIFFER_BETWEEN_NODES}
    # Where ranks split layers or experts, a compiled layer that is recomputed repeats other collectives than an eager
    # one. A compiled update of bf16 moments may differ from an eager one in the last bit, and so would replicas.
    split = options.model_parallel_size * options.expert_parallel > 1
    run["torch_compile"] = options.torch_compile and (split or options.optim_state_dtype == "bfloat16")
    run |= dataclasses.asdict(identity) | {"weights": fingerprint_files(files_of(weights))}
    run |= {f"config.json: {name}": value for name, value in config.to_dict().items() if name != "_name_or_path"}
    runs = gather_objects(run)
    if others := [rank for rank, other in enumerate(runs) if other != runs[0]]:
        names = {name: None for other in runs for name in other}
        different = [name for name in names if any(other.get(name) != runs[0].get(name) for other in runs)]
        raise OptionError(
            f"ranks {others}: not the same as on rank 0: {', '.join(different)}\n"
            "pass all ranks the same options, files and Python version"
        )
    require_shared(Path(options.output_dir))
