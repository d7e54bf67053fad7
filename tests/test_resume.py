"""Proves checkpoint/load.py, state.py, rng.py and identity.py: a resumed run equals the run without interruption."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

import checkpoint
from checkpoint.identity import Progress, RunIdentity, require_same_run
from checkpoint.load import load_checkpoint, problems
from checkpoint.rng import rng_state
from checkpoint.save import Saver
from config.errors import OptionError
from config.options import Options
from metrics.records import read_records
from model.weights import Stored
from tests.launch import train, train_ok
from tests.proof import GATES, read_tensors, relative_l2

# With these, a run of 8 steps and a run of 16 do the same in the first 8.
STEADY = ["--lr_scheduler_type", "constant_with_warmup", "--eval_steps", 5]
NOT_IN_TRAJECTORY = (
    *("tokens_per_second", "peak_memory_gib", "data_wait_seconds", "save_seconds"),
    *("slowest_rank", "slowest_rank_lag"),
)


def trajectory(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run without the fields that depend on time or memory."""
    rows = read_records(output_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in NOT_IN_TRAJECTORY} for row in rows]


def equal_to_the_bit(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same parameters, moments and step."""
    for name in ("model", "optimizer"):
        ours, theirs = read_tensors(first / name), read_tensors(second / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    return all(states[0][key] == states[1][key] for key in ("progress", "optimizer_steps"))


def cut_off_at(step: int, run: Path, copy: Path) -> None:
    """Make `copy` what is left of `run` when it is killed some steps after `checkpoint-step` was saved."""
    shutil.copytree(run / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    written = [row for row in rows if json.loads(row)["step"] <= step + 3]
    (copy / "metrics.jsonl").write_text("".join(written) + rows[len(written)][:20])  # the last row only in part


def nothing_read() -> None:
    """Patch a rank: the files that the model began with are not to be read."""

    def read(self: Stored, *place: Any) -> Tensor:
        raise AssertionError("a checkpoint has all that they have")

    Stored.read = read  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (
                "ddp",
                "fsdp --optim muon",
                "fsdp --tensor_parallel 2",
                "ddp --optim_state_dtype bfloat16",
                "fsdp --optim_state_dtype bfloat16",
            )
        ),
    ],
)
def test_same_ranks_to_the_bit(tiny: list[object], model_with_dropout: Path, tmp_path: Path, strategy: str) -> None:
    """Parameters, moments, RNG, data order and all rows; with dropout, checkpointing, workers, across epochs."""
    options = [*tiny, "--model_name_or_path", model_with_dropout, "--strategy", *strategy.split()]
    options += ["--gradient_checkpointing"]
    options += ["--global_batch_size", 80, "--per_device_train_batch_size", 20, "--dataloader_num_workers", 1]
    options += ["--max_steps", 16, "--save_steps", 8, "--scale_learning_rate", "sqrt", "--reference_batch_size", 20]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert "learning rate 0.006 = 0.003 x sqrt(80 / 20 sequences)" in train_ok(2, *options, "--output_dir", unbroken)
    assert read_records(unbroken / "metrics.jsonl")[-1]["epoch"] > 1, "it must cross the end of an epoch"
    cut_off_at(8, unbroken, resumed)
    outcome = train(2, [*options, "--output_dir", resumed, "--resume_from_checkpoint", "auto"], before=nothing_read)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert trajectory(resumed) == trajectory(unbroken)
    assert len(trajectory(resumed)) == 16 + 2
    first, second = unbroken / "checkpoint-16", resumed / "checkpoint-16"
    assert equal_to_the_bit(first, second)
    rng = [json.loads((path / "state.json").read_text())["rng"] for path in (first, second)]
    assert rng[0] == rng[1]


def test_four_ranks_with_ddp_to_the_bit(tiny: list[object], tmp_path: Path) -> None:
    """A sum of four gradients depends on the place of a parameter in its bucket, so the buckets must never change."""
    options = [*tiny, "--max_steps", 6, "--save_steps", 2]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train_ok(4, *options, "--output_dir", unbroken)
    cut_off_at(2, unbroken, resumed)
    train_ok(4, *options, "--output_dir", resumed, "--resume_from_checkpoint", "auto")
    assert trajectory(resumed) == trajectory(unbroken)
    assert equal_to_the_bit(resumed / "checkpoint-6", unbroken / "checkpoint-6")


def test_each_rank_draws_its_own_dropout(tiny: list[object], model_with_dropout: Path, tmp_path: Path) -> None:
    """After drawing for rows of one length, as many numbers on each rank, the generators of all ranks differ."""
    options = [*tiny, "--model_name_or_path", model_with_dropout, "--packing", "concat", "--max_steps", 2]
    train_ok(4, *options, "--output_dir", tmp_path)
    rng = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["rng"]
    assert len({state["cpu"] for state in rng}) == 4


@pytest.fixture(scope="module")
def ddp_on_two(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("ddp")
    train_ok(2, *tiny, *STEADY, "--output_dir", output_dir, "--save_steps", 10)
    return output_dir


def save_again(elsewhere: Path) -> None:
    """Patch a rank so that it saves what it has just loaded, elsewhere."""
    load = checkpoint.load_checkpoint

    def load_and_save(path: Path, model: Any, optimizer: Any, identity: RunIdentity) -> Progress:
        progress = load(path, model, optimizer, identity)
        elsewhere.mkdir(exist_ok=True)
        saver = Saver(Options(output_dir=str(elsewhere), async_save=False))
        saver.save(model, optimizer, progress, identity)
        return progress

    checkpoint.load_checkpoint = load_and_save


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        pytest.param(1, "ddp", marks=pytest.mark.slow),
        pytest.param(4, "ddp", marks=pytest.mark.slow),
        pytest.param(1, "fsdp", marks=pytest.mark.slow),
        (2, "fsdp"),
        pytest.param(4, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "ddp --shard_optimizer", marks=pytest.mark.slow),
        pytest.param(2, "fsdp --reshard_after_forward false", marks=pytest.mark.slow),
        pytest.param(4, "fsdp --replicas 2", marks=pytest.mark.slow),
        pytest.param(2, "fsdp --cpu_offload", marks=pytest.mark.slow),
        (4, "fsdp --tensor_parallel 2"),
        pytest.param(4, "fsdp --context_parallel 4", marks=pytest.mark.slow),
    ],
)
def test_other_ranks_and_strategies(
    tiny: list[object],
    ddp_on_two: Path,
    tmp_path: Path,
    world_size: int,
    strategy: str,
) -> None:
    """The loaded state is the saved one to the bit; what follows differs by rounding. Then back to two DDP ranks."""
    resumed = tmp_path / "resumed"
    cut_off_at(10, ddp_on_two, resumed)
    options = [*tiny, *STEADY, "--output_dir", resumed, "--resume_from_checkpoint", "auto", "--save_steps", 15]
    outcome = train(
        world_size,
        [*options, "--strategy", *strategy.split(), "--max_steps", 15],
        before=partial(save_again, tmp_path / "again"),
    )
    assert outcome.exit_codes == [0] * world_size, outcome.output
    assert equal_to_the_bit(tmp_path / "again" / "checkpoint-10", ddp_on_two / "checkpoint-10")

    train_ok(2, *options)
    expected = load_file(ddp_on_two / "model.safetensors")
    assert relative_l2(load_file(resumed / "model.safetensors"), expected) < GATES.parameters
    for row, reference in zip(trajectory(resumed), trajectory(ddp_on_two), strict=True):
        assert row.keys() == reference.keys()
        for key in ("loss", "eval_loss"):
            if key in row:
                assert row[key] == pytest.approx(reference[key], abs=1e-5)


@pytest.mark.fault(
    "storage",
    "the newest checkpoint is damaged; others have names like `checkpoint-20-backup`",
    "`auto` names the damaged one and resumes the one before it; other names are never selected",
)
def test_chooses_the_newest_valid_one(tiny: list[object], ddp_on_two: Path, tmp_path: Path) -> None:
    """A damaged checkpoint is passed over, named and kept; a directory with a similar name is passed over."""
    run = tmp_path / "run"
    shutil.copytree(ddp_on_two, run)
    for name in ("checkpoint-30.tmp", "checkpoint-40-backup", "checkpoint-", "checkpoint-x"):
        shutil.copytree(run / "checkpoint-10", run / name)
    shard = next((run / "checkpoint-20" / "optimizer").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    output = train_ok(2, *tiny, *STEADY, "--output_dir", run, "--resume_from_checkpoint", "auto")
    assert f"warning: {run}/checkpoint-20: damaged" in output
    assert output.count("warning: ") == 1
    assert f"resumed from {run}/checkpoint-10" in output
    assert equal_to_the_bit(run / "checkpoint-20", ddp_on_two / "checkpoint-20")
    (aside,) = run.glob("checkpoint-20-put-aside-*")
    assert (aside / "optimizer" / shard.name).read_bytes() == bytes(content)


@pytest.mark.fault(
    "storage",
    "any file of a checkpoint truncated, deleted, or with one bit flipped",
    "the checkpoint counts as damaged",
)
def test_every_damage_is_found(ddp_on_two: Path, tmp_path: Path) -> None:
    """Each file of a checkpoint in turn is truncated, deleted, or has one bit flipped; each damage is found."""
    intact = ddp_on_two / "checkpoint-10"
    assert problems(intact) == []
    names = [path.relative_to(intact) for path in intact.rglob("*") if path.is_file()]
    assert len(names) == 6  # two shards of the model, two of the optimizer, state.json, manifest.json
    for name in names:
        for damage in ("truncated", "deleted", "flipped"):
            copy = tmp_path / damage / name
            shutil.copytree(intact, copy)
            content = (copy / name).read_bytes()
            if damage == "truncated":
                (copy / name).write_bytes(content[:-1])
            elif damage == "deleted":
                (copy / name).unlink()
            else:
                middle = len(content) // 2
                (copy / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            assert problems(copy), (name, damage)


def test_finished_run_resumes_to_itself(tiny: list[object], ddp_on_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ddp_on_two, run)
    train_ok(2, *tiny, *STEADY, "--output_dir", run, "--resume_from_checkpoint", "auto")
    assert trajectory(run) == trajectory(ddp_on_two)
    assert (run / "model.safetensors").read_bytes() == (ddp_on_two / "model.safetensors").read_bytes()


def test_resume_beyond_max_steps(tiny: list[object], ddp_on_two: Path, tmp_path: Path) -> None:
    """The run is complete, which is said; the final model is written, because it is missing; nothing is trained."""
    run = tmp_path / "run"
    shutil.copytree(ddp_on_two, run)
    (run / "model.safetensors").unlink()
    output = train_ok(2, *tiny, *STEADY, "--output_dir", run, "--max_steps", 15, "--resume_from_checkpoint", "auto")
    assert "step 20 of 15: the run is complete" in output
    assert "stopped" not in output
    assert (run / "model.safetensors").read_bytes() == (ddp_on_two / "model.safetensors").read_bytes()
    assert trajectory(run) == trajectory(ddp_on_two)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-20"}


@pytest.mark.fault(
    "configuration",
    "a resume with another seed, global batch size or sequence length",
    "refused with the option to pass; no file of the run changes",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", 7], "pass --seed 42"),
        (["--global_batch_size", 8], "pass --global_batch_size 16"),
        (["--block_size", 32], "resume with the data"),
    ],
)
def test_another_run_is_refused(tiny: list[object], ddp_on_two: Path, change: list[object], message: str) -> None:
    """A resume that would change the order or the content of the data is refused."""
    before = sorted(ddp_on_two.rglob("*"))
    outcome = train(2, [*tiny, *STEADY, "--output_dir", ddp_on_two, "--resume_from_checkpoint", "auto", *change])
    assert outcome.exit_codes == [2, 2]
    assert message in outcome.output
    assert sorted(ddp_on_two.rglob("*")) == before


@pytest.mark.fault(
    "data",
    "one character of the training data changed under a resume",
    "refused before the first step",
)
def test_changed_data_is_refused(tiny: list[object], train_file: Path, ddp_on_two: Path, tmp_path: Path) -> None:
    """One changed character in one document is enough to refuse the resume."""
    changed = tmp_path / train_file.name
    changed.write_text(train_file.read_text().replace("the", "The", 1))
    run = [*tiny, *STEADY, "--output_dir", ddp_on_two, "--resume_from_checkpoint", "auto"]
    outcome = train(2, [*run, "--train_file", changed])
    assert outcome.exit_codes == [2, 2]
    assert "data_fingerprint was" in outcome.output


IDENTITY = RunIdentity("model", "data", seed=1, global_batch_size=16, optim="adamw_torch_fused")


@pytest.mark.fault(
    "configuration",
    "a resume with another model, data set or optimizer",
    "refused with both values and a remedy",
)
@pytest.mark.parametrize("field", dataclasses.fields(RunIdentity), ids=lambda field: field.name)
def test_each_field_of_the_identity_is_refused_at_resume(field: Any, alone: None, tmp_path: Path) -> None:
    """A checkpoint of another model, data, seed, batch size or optimizer: the message has both values and a remedy."""
    saved = dataclasses.asdict(Progress()) | dataclasses.asdict(IDENTITY) | {field.name: "other"}
    rest = {"optimizer_steps": {}, "options": {}, "versions": {}, "rng": [rng_state()]}
    (tmp_path / "state.json").write_text(json.dumps({"progress": saved, **rest}))
    remedy = field.metadata["remedy"].format("other")
    now = getattr(IDENTITY, field.name)
    with pytest.raises(OptionError, match=f"{field.name} was other and is {now} now\n{re.escape(remedy)}"):
        load_checkpoint(tmp_path, nn.Linear(1, 1), None, IDENTITY)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", dataclasses.fields(RunIdentity), ids=lambda field: field.name)
def test_each_field_of_the_identity_is_refused_between_ranks(
    field: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 was given another one: all ranks are told which field differs."""
    monkeypatch.setattr("checkpoint.identity.gather_objects", lambda run: [run, run | {field.name: "other"}])
    with pytest.raises(OptionError, match=rf"ranks \[1\]: not the same as on rank 0: {field.name}"):
        require_same_run(Options(output_dir=str(tmp_path)), IDENTITY, {}, PretrainedConfig())


@pytest.mark.parametrize(
    ("more", "allowed"),
    [({}, True), ({"tensor_parallel": 2}, False), ({"optim_state_dtype": "bfloat16"}, False)],
    ids=str,
)
def test_compiled_on_one_rank_only(
    more: dict[str, Any], allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node without a compiler is fine, unless recomputed layers differ in collectives, or moments in their bits."""
    monkeypatch.setattr("checkpoint.identity.require_shared", lambda output_dir: None)
    ranks: list[Any] = []

    def all_ranks_so_far(value: Any) -> list[Any]:
        ranks.append(value)
        return ranks

    monkeypatch.setattr("checkpoint.identity.gather_objects", all_ranks_so_far)
    options = Options(output_dir=str(tmp_path), torch_compile=True, **more)
    require_same_run(options, IDENTITY, {}, PretrainedConfig())
    with nullcontext() if allowed else pytest.raises(OptionError, match="rank 0: torch_compile"):
        require_same_run(dataclasses.replace(options, torch_compile=False), IDENTITY, {}, PretrainedConfig())
