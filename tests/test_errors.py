"""Proves config/checks.py, config/command_line.py, config/plan.py, runtime.py and checkpoint/output_dir.py.

A mistake of the user ends the run with a message of one to three lines and exit code 2. There is no traceback, and no
file on the disk is lost.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoint.output_dir import _clean, claim_output_dir
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from tests.faults.torchrun import torchrun
from tests.launch import ROOT, train, train_ok


def refused(*argv: object, world_size: int = 1) -> str:
    """The message with which train.py refuses `argv`."""
    outcome = train(world_size, argv)
    assert outcome.exit_codes == [2] * world_size, outcome.output
    assert "Traceback" not in outcome.output
    # Here no torchrun ends the other ranks, so each rank prints the message.
    _, *messages = outcome.output.split("train.py: error: ")
    assert len(messages) == world_size
    assert len(messages[0].splitlines()) <= 3
    return messages[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--leaning_rate", "1"], "--leaning_rate: unknown option; did you mean --learning_rate?"),
        (["--zzz"], "--zzz: unknown option"),
        (["--strategy", "zero"], "argument --strategy: invalid choice: 'zero' (choose from "),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--block_size", "1"], "block_size 1: must be at least 2"),
        (["--learning_rate", "nan"], "learning_rate nan: must be at least 0"),
        (["--adam_beta1", "1"], "adam_beta1 1.0: must be at least 0 and below 1"),
        (["--replicas", "2"], "replicas 2: needs --strategy fsdp"),
        (["--strategy", "fsdp", "--replicas", "3"], "2 ranks are 0.667 for each replica"),
        (
            ["--cpu_offload"],
            "cpu_offload true: ddp has the full model on the GPU\npass --strategy fsdp, or remove --cpu_",
        ),
        (["--sync_each_batch"], "sync_each_batch true: ddp has full gradients in any case\npass --strategy fsdp, or"),
        (
            ["--offload_activations"],
            "offload_activations true: it offloads the inputs that gradient checkpointing saves",
        ),
        (["--activation_memory_budget", "2", "--torch_compile"], "activation_memory_budget 2.0: pass a fraction from"),
        (["--activation_memory_budget", "0.5"], "activation_memory_budget 0.5: needs torch_compile, because the c"),
        (
            ["--activation_memory_budget", "0.5", "--torch_compile", "--gradient_checkpointing"],
            "activation_memory_budget 0.5: cannot be combined with gradient_checkpointing, which saves a layer's input",
        ),
        (["--lr_scheduler_kwargs", '{"a": 1}'], 'lr_scheduler_kwargs {"a": 1}: a: unknown\n--lr_scheduler_type cosine'),
        (
            ["--lr_scheduler_type", "WarmupLR", "--lr_scheduler_kwargs", '{"total_num_steps": 9}'],
            "--lr_scheduler_type WarmupLR takes a JSON mapping of warmup_type, warmup_min_lr",
        ),
        (["--tensor_parallel", "2"], "tensor_parallel 2: needs --strategy fsdp"),
        (["--strategy", "fsdp", "--tensor_parallel", "3"], "2 ranks are 0.667 groups of 3"),
        (
            ["--strategy", "fsdp", "--tensor_parallel", "2", "--gradient_checkpointing", "--offload_activations"],
            "offload_activations true: cannot be combined with tensor_parallel 2\nremove one of them",
        ),
        (
            ["--strategy", "fsdp", "--tensor_parallel", "2", "--global_batch_size", "15"],
            "per_device_train_batch_size 4 x 1 group of 2 ranks = 4 sequences; 15 / 4 = 3.75",
        ),
        (["--reshard_after_forward", "false"], "reshard_after_forward false: ddp shards no parameters"),
        (["--context_parallel", "3"], "context_parallel 3: 2 ranks are 0.667 groups of 3"),
        (
            ["--context_parallel", "2", "--objective", "dpo"],
            "context_parallel 2: cannot be combined with objective dpo",
        ),
        (
            ["--strategy", "fsdp", "--tensor_parallel", "2", "--context_parallel", "2"],
            "context_parallel 2: cannot be combined with tensor_parallel 2\nremove one of them",
        ),
        (
            ["--strategy", "fsdp", "--tensor_parallel", "2", "--optim", "muon"],
            "optim muon: cannot be combined with tensor_parallel 2, because Muon needs the full matrix",
        ),
        (
            ["--strategy", "fsdp", "--cpu_offload", "--optim", "muon"],
            "optim muon: cannot be combined with cpu_offload true",
        ),
        (["--bf16_residual", "--bf16", "false"], "bf16_residual true: needs bf16; pass --bf16 true"),
        (["--float8", "--bf16", "false"], "float8 true: needs bf16; pass --bf16 true"),
        (
            ["--strategy", "fsdp", "--tensor_parallel", "2", "--float8", "--bf16", "true"],
            "float8 true: cannot be combined with tensor_parallel 2\nremove one of them",
        ),
        (["--validation_split_percentage", "100"], "validation_split_percentage 100: pass 0 to 99"),
        (["--objective", "dpo", "--packing", "none"], "packing none: cannot be combined with objective dpo"),
        (["--dpo_beta", "0"], "dpo_beta 0.0: pass more than 0"),
        (["--num_train_epochs", "-1"], "num_train_epochs -1.0: pass more than 0, or 0 to evaluate only"),
        (["--train_file", "a.txt", "--dataset_name", "b"], "train_file a.txt: cannot be combined with dataset_name b"),
        (
            ["--model_name_or_path", "a", "--config_name", "b"],
            "model_name_or_path a: cannot be combined with config_name b",
        ),
        (
            ["--train_mixture", "a.jsonl=1", "--train_file", "b"],
            "train_file b: cannot be combined with train_mixture a.jsonl=1",
        ),
        (["--train_mixture", "a.jsonl"], "train_mixture a.jsonl: pass NAME=WEIGHT"),
        (["--train_mixture", "a.jsonl=1,b.jsonl=0"], "train_mixture b.jsonl=0: pass NAME=WEIGHT"),
        (
            ["--streaming", "--train_file", "a", "--num_train_epochs", "1"],
            "streaming true: the number of sequences is not",
        ),
        (
            ["--streaming", "--max_steps", "3"],
            "streaming true: pass what to stream: --train_file, --train_mixture or --dataset_name",
        ),
        (["--validation_file", "a.txt"], "validation_file a.txt: pass --train_file"),
        (["--ddp_backend", "nccl"], "ddp_backend nccl: there is no GPU here"),
        (["--scale_learning_rate", "sqrt"], "scale_learning_rate sqrt, reference_batch_size None: pass both"),
        (["--reference_batch_size", "8"], "scale_learning_rate none, reference_batch_size 8: pass both or neither"),
        (["missing.json"], "missing.json: cannot be read as a file of options"),
        (["options.ini"], "options.ini: not an option and not a .json or .yaml file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options(argv: list[str], expected: str) -> None:
    with pytest.raises(OptionError) as error:
        check(parse(argv), world_size=2)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_impossible_division_shows_the_arithmetic() -> None:
    message = refused("--global_batch_size", 30, "--per_device_train_batch_size", 4, world_size=2)
    assert message.startswith(
        "global_batch_size 30: not a multiple of per_device_train_batch_size 4 x 2 ranks = 8 sequences"
    )
    assert "30 / 8 = 3.75 micro-steps" in message


@pytest.mark.slow
def test_printed_once_by_torchrun(tmp_path: Path) -> None:
    """With the real torchrun, one of two ranks prints the message. The rest is the report of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    run = subprocess.run([*command, "--train_file", "no.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1  # of torchrun, whose report has the exit code 2 of the ranks
    assert "exitcode  : 2" in run.stderr
    assert run.stderr.count("train.py: error: train_file no.txt: No such file or directory; pass a readable file") == 1
    assert 'train.py", line' not in run.stderr, "a traceback of train.py"


def test_without_torchrun() -> None:
    """Without a launcher, the environment does not say which rank this is."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "train.py"), "--zzz"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr == "train.py: error: --zzz: unknown option; `python train.py --help` lists every option\n"


def another_value_on_rank_1(option: str, value: str) -> None:
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index(option) + 1] = value


@pytest.mark.parametrize(
    ("option", "values"),
    [("--seed", ("42", "7")), ("--tensor_parallel", ("1", "2"))],  # the second would hang
    ids=str,
)
def test_ranks_with_different_jobs(tiny: list[object], tmp_path: Path, option: str, values: tuple[str, str]) -> None:
    argv = [*tiny, "--output_dir", tmp_path, "--strategy", "fsdp", option, values[0]]
    outcome = train(2, argv, before=partial(another_value_on_rank_1, option, values[1]))
    assert outcome.exit_codes == [2, 2]
    assert "ranks [1]: not the same as on rank 0: " in outcome.output
    assert option[2:] in outcome.output
    assert not (tmp_path / "metrics.jsonl").exists()


def other_weights_on_rank_1(other: Path) -> None:
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--model_name_or_path") + 1] = str(other)


@pytest.mark.fault(
    "storage",
    "one node has other weights under the same path",
    "refused before the first step",
)
def test_ranks_with_different_weights(tiny: list[object], model_dir: Path, tmp_path: Path) -> None:
    """Weights of the same shapes with other values, as if each node had its own files."""
    shutil.copytree(model_dir, tmp_path / "other")
    tensors = {name: tensor + 1 for name, tensor in load_file(model_dir / "model.safetensors").items()}
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    argv = [*tiny, "--output_dir", tmp_path / "run"]
    outcome = train(2, argv, before=partial(other_weights_on_rank_1, tmp_path / "other"))
    assert outcome.exit_codes == [2, 2]
    assert "ranks [1]: not the same as on rank 0: weights\n" in outcome.output


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_files(tiny: list[object], tmp_path: Path) -> None:
    output = ["--output_dir", tmp_path / "output"]
    for name, content, expected in (
        ("empty.txt", "", "the file is empty"),
        ("text.doc", "a,b", "pass .txt, .jsonl, .json, "),
        ("other.jsonl", '{"content": "a", "id": 3}\n', "has no such column, only content, id\npass --text_column"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "broken.jsonl: line 2: cannot be read as JSON"),
        ("broken.parquet", "no parquet", "cannot be read as .parquet"),
        ("numbers.jsonl", '{"text": "a"}\n{"text": 3}\n' * 9, "numbers.jsonl: line 2 has no text in column text: 3"),
        ("short.jsonl", '{"text": "a b c"}\n', "all its documents are held out for validation"),
    ):
        path = write(tmp_path / name, content)
        message = refused(*tiny, *output, "--train_file", path)
        assert str(path) in message or "text_column" in message
        assert expected in message, name
        assert path.read_bytes() == content.encode()
    assert "train_file /none.txt: No such file" in refused(*tiny, *output, "--train_file", "/none.txt")
    assert "dataset_name" in refused(*tiny, *output, "--train_file", "", "--dataset_name", tmp_path / "none")


@pytest.mark.fault(
    "data",
    "a data set smaller than one global batch",
    "refused with the arithmetic",
)
def test_small_data(tiny: list[object], tmp_path: Path) -> None:
    """Data smaller than one global batch is an error with the arithmetic."""
    message = refused(*tiny, "--output_dir", tmp_path, "--global_batch_size", 8000)
    assert message.startswith(
        "global batch of 8000 sequences = per_device_train_batch_size 4 x accumulation 2000 x 1 rank: "
    )


@pytest.mark.fault(
    "configuration",
    "a sequence beyond the positions of the model, a missing or misshapen tensor, a truncated file of weights",
    "refused before the first step, with the tensor or the number",
)
def test_model_and_tokenizer(tiny: list[object], model_dir: Path, tmp_path: Path) -> None:
    def broken(name: str, **changes: Any) -> Path:
        shutil.copytree(model_dir, tmp_path / name)
        config = json.loads((model_dir / "config.json").read_text())
        write(tmp_path / name / "config.json", json.dumps(config | changes))
        return tmp_path / name

    def message(path: Path, *more: object) -> str:
        return refused(*tiny, "--output_dir", tmp_path / "output", "--model_name_or_path", path, *more)

    assert "block_size 300: the model has 256 positions" in message(model_dir, "--block_size", 300)
    assert "its highest token id is 383, beyond the model's vocabulary of 100" in message(broken("v", vocab_size=100))
    assert f"model_name_or_path {tmp_path}/none: no such file or directory" in message(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"model_name_or_path {tmp_path}/empty: it has no config.json" in message(tmp_path / "empty")
    (tmp_path / "empty" / "state.json").touch()
    assert "it is a checkpoint of a run, not a finished model" in message(tmp_path / "empty")
    unknown = message(model_dir, "--tokenizer_name", tmp_path / "none")
    assert f"tokenizer_name {tmp_path}/none: no such file or directory" in unknown
    (broken("mute") / "tokenizer.json").unlink()
    (tmp_path / "mute" / "tokenizer_config.json").unlink()
    assert f"{tmp_path}/mute: no tokenizer could be loaded" in message(tmp_path / "mute")

    short = broken("truncated")
    write(short / "model.safetensors", (model_dir / "model.safetensors").read_bytes()[:-100])
    assert f"model_name_or_path {short}: model.safetensors is damaged: " in message(short)

    tensors = load_file(model_dir / "model.safetensors")
    missing = broken("missing")
    kept = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(kept, missing / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing tensors, for instance model.norm.weight" in message(missing)
    assert "mismatched shapes: " in message(broken("misshapen", intermediate_size=32))
    assert "unexpected tensors" in message(broken("unexpected", num_hidden_layers=1, layer_types=["full_attention"]))


@pytest.mark.fault(
    "configuration",
    "a user's mistake under torchrun, whose traceback follows the message",
    "torchrun's summary, the last that it prints, has the message, too",
)
def test_torchrun_says_it_last(tmp_path: Path) -> None:
    argv = ["--learning_rate", -1, "--output_dir", tmp_path / "output"]
    with torchrun(["--standalone", "--nproc_per_node", 2], argv, tmp_path / "log") as run:
        assert run.end() == 1
        summary = run.output().rpartition("Root Cause")[2]
    assert re.search(r"traceback : learning_rate -1\.0: must be at least 0\n=+$", summary.rstrip())


def test_the_only_document(tiny: list[object], tmp_path: Path) -> None:
    """A text that is too short for two splits is not held out in silence."""
    write(tmp_path / "one.txt", "the use of the copyright " * 200)
    options = [*tiny, "--train_file", tmp_path / "one.txt", "--output_dir", tmp_path / "output", "--max_steps", 1]
    message = refused(*options, "--validation_split_percentage", 5)
    assert "one.txt: all its documents are held out for validation" in message
    assert "pass --validation_split_percentage 0" in message
    train_ok(1, *options, "--validation_split_percentage", 0)


@pytest.fixture(scope="module")
def finished(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("finished")
    train_ok(1, *tiny, "--output_dir", output_dir, "--max_steps", 4, "--save_steps", 2)
    return output_dir


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_output_dir_with_a_run(tiny: list[object], finished: Path, model_dir: Path) -> None:
    """A run is refused unless it is resumed or replaced, and no file in it changes."""
    before = content(finished)
    message = refused(*tiny, "--output_dir", finished)
    assert message.startswith(f"output_dir {finished}: it holds a run already")
    assert "--resume_from_checkpoint auto" in message
    assert "--overwrite_output_dir" in message
    assert "it is the model's own directory" in refused(*tiny, "--output_dir", model_dir, "--overwrite_output_dir")
    # An error that is found later, although the run may be replaced.
    refused(*tiny, "--output_dir", finished, "--overwrite_output_dir", "--global_batch_size", 8000)
    assert content(finished) == before


def test_a_checkpoint_of_another_run_does_not_go_on_here(finished: Path, tmp_path: Path) -> None:
    """Two runs in one directory would be mixed. An empty directory may continue any run."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before, wanted = content(run), str(finished / "checkpoint-2")
    for overwrite in (False, True):
        options = Options(output_dir=str(run), resume_from_checkpoint=wanted, overwrite_output_dir=overwrite)
        with pytest.raises(OptionError, match=r"holds another run than .*checkpoint-2\npass another --output_dir"):
            claim_output_dir(options, 0)
        assert content(run) == before | {str(run / ".lock"): b""}
    for directory, checkpoint in ((tmp_path / "new", wanted), (run, str(run / "checkpoint-2"))):
        lock = claim_output_dir(Options(output_dir=str(directory), resume_from_checkpoint=checkpoint), 0)
        assert lock
        lock.close()


def test_overwrite_replaces_the_run_alone(tiny: list[object], finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    write(run / "notes.txt", "mine")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-2-backup")
    train_ok(1, *tiny, "--output_dir", run, "--max_steps", 2, "--overwrite_output_dir")
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "checkpoint-2-backup" / "manifest.json").exists()
    assert not (run / "checkpoint-4").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 + 2


def test_damaged_checkpoint(tiny: list[object], finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoint-4" / "state.json").write_text("{}")
    before = content(run)
    message = refused(*tiny, "--output_dir", run, "--resume_from_checkpoint", run / "checkpoint-4", world_size=2)
    assert message.startswith(f"resume_from_checkpoint {run}/checkpoint-4: no valid checkpoint: ")
    assert "state.json is not what was saved" in message
    (run / "checkpoint-2" / "manifest.json").unlink()
    message = refused(*tiny, "--output_dir", run, "--resume_from_checkpoint", run / "checkpoint-2")
    assert "checkpoint-2/manifest.json is missing" in message
    outcome = train(1, [*tiny, "--output_dir", run, "--resume_from_checkpoint", "auto"])
    assert "all 2 checkpoints of" in outcome.output
    assert outcome.exit_codes == [2]
    assert content(run) == {name: data for name, data in before.items() if "checkpoint-2/manifest" not in name}


def test_finished_model_without_checkpoints(tiny: list[object], finished: Path, tmp_path: Path) -> None:
    """`auto` starts from the beginning in an empty directory, but does not replace a finished model."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    message = refused(*tiny, "--output_dir", run, "--resume_from_checkpoint", "auto")
    assert "holds a finished model but no checkpoint" in message


@pytest.mark.fault(
    "storage",
    "`output_dir` or `data_cache_dir` cannot be created or written",
    "refused before the first step",
)
def test_directory_that_cannot_be_written(tiny: list[object], tmp_path: Path) -> None:
    """A file in place of the directory, and a file system that is read-only, because permissions do not bind root."""
    write(tmp_path / "file", "")
    message = refused(*tiny, "--output_dir", tmp_path / "file" / "output")
    assert message.startswith(f"output_dir {tmp_path}/file/output: Not a directory; pass a directory that can be")
    assert "output_dir /proc/output: " in refused(*tiny, "--output_dir", "/proc/output")
    message = refused(*tiny, "--output_dir", tmp_path / "output", "--data_cache_dir", "/proc/cache")
    assert message.startswith("data_cache_dir /proc/cache: ")


@pytest.mark.fault(
    "storage",
    "a second run on the same output directory",
    "refused before the first step",
)
def test_second_run_on_the_same_directory(tiny: list[object], tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "another run writes to it" in refused(*tiny, "--output_dir", tmp_path)


HF_STATE = '{"global_step": 500}'


def test_resume_auto_among_checkpoints_of_another_trainer(model_dir: Path, tmp_path: Path) -> None:
    """The message names them, and never says to overwrite them."""
    for number, name in enumerate(
        (
            "checkpoint-500/trainer_state.json",
            "checkpoint_3/random_states_0.pkl",
            "step-100/.metadata",
            "checkpoint/step-100/.metadata",
            "global_step20/mp_rank_00_model_states.pt",
            "checkpoints/epoch=1-step=9.ckpt",
            "iter_0000100/metadata.json",
        )
    ):
        output_dir = tmp_path / str(number)
        (output_dir / name).parent.mkdir(parents=True)
        write(output_dir / name, HF_STATE)
        options = Options(output_dir=str(output_dir), resume_from_checkpoint="auto")
        for rank in (0, 1):  # without torchrun, a rank that rank 0 leaves alone would wait for it
            with pytest.raises(OptionError) as error:
                claim_output_dir(options, rank)
        assert f"{output_dir} has checkpoints of another trainer, which cannot be resumed here: " in str(error.value)
        assert "overwrite" not in str(error.value)
        assert (output_dir / name).read_text() == HF_STATE


@pytest.mark.parametrize("more", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint-500/trainer_state.json", "model.safetensors", "config.json", "metrics.jsonl"),
        "adapter_model.safetensors",
    ],
)
def test_files_of_another_program_stay(model_dir: Path, tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """A run would replace them, so it is refused, whatever is asked for; no remedy deletes them."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, (model_dir / name).read_bytes() if (model_dir / name).exists() else HF_STATE)
    before = content(tmp_path)
    with pytest.raises(OptionError) as error:
        claim_output_dir(Options(output_dir=str(tmp_path), **more), 0)
    assert f"did not write {Path(name).parts[0]}" in str(error.value) or "another trainer" in str(error.value)
    assert "overwrite" not in str(error.value)
    assert content(tmp_path) == before | {str(tmp_path / ".lock"): b""}


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    """Notes, logs and checkpoints of other names are no reason to refuse a new run, and it leaves them."""
    for name in ("notes.txt", "README.md", "slurm-1.out", "trace/mine.json", "step-100/.metadata", "training_args.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "mine")
    before = content(tmp_path)
    for overwrite in (False, True):
        options = Options(output_dir=str(tmp_path), overwrite_output_dir=overwrite)
        lock = claim_output_dir(options, 0)
        _clean(options, 0, 0)
        assert lock
        lock.close()
        assert content(tmp_path) == before | {str(tmp_path / ".lock"): b""}


def test_overwrite_deletes_what_this_trainer_wrote(finished: Path, tmp_path: Path) -> None:
    """All files of a run, also of one that is damaged or was deleted in part, and no file of the user."""
    mine = [
        *("notes.txt", "ledger/notes.txt", "checkpoint-2-backup/manifest.json", "checkpoint-x/a", "step-1/.metadata"),
        *("pytorch_model.bin", "adapter.safetensors", "runs/events.out.tfevents.1"),
        *("wandb/run-1.wandb", "swanlab/run-1.swanlab"),  # of another run of the tracker, perhaps not sent yet
    ]
    theirs = ["ledger/rank-0.jsonl", "ledger/about.json", "tensorboard/events.out.tfevents.1", "trace/steps-1-2.json"]
    theirs += ["trackers.json", "memory/rank-0.pickle"]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoint-2" / "manifest.json").unlink()  # pruning was interrupted
    (run / "checkpoint-2" / "state.json").unlink()
    write(run / "checkpoint-4" / "notes.txt", "kept with its checkpoint")
    for name in (*mine, *theirs):
        (run / name).parent.mkdir(exist_ok=True)
        write(run / name, "{}")
    options = Options(output_dir=str(run), overwrite_output_dir=True)
    lock = claim_output_dir(options, 0)
    _clean(options, 0, 0)
    assert lock
    lock.close()
    assert set(content(run)) == {str(run / name) for name in (*mine, ".lock")}
    assert not (run / "trace").exists()


def test_a_model_put_into_a_finished_run_stays(finished: Path, model_dir: Path, tmp_path: Path) -> None:
    """The directory is of this trainer, but one model in it is not."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copy(model_dir / "model.safetensors", run / "model.safetensors")
    before = content(run)
    with pytest.raises(OptionError, match=r"this trainer did not write model\.safetensors, and a run would replace"):
        claim_output_dir(Options(output_dir=str(run), overwrite_output_dir=True), 0)
    assert content(run) == before


def test_resume_from_a_checkpoint_of_another_trainer(tiny: list[object], tmp_path: Path) -> None:
    (tmp_path / "hf" / "checkpoint-500").mkdir(parents=True)
    write(tmp_path / "hf" / "checkpoint-500" / "trainer_state.json", HF_STATE)
    wanted = tmp_path / "hf" / "checkpoint-500"
    message = refused(*tiny, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", wanted)
    assert "another trainer wrote it; to start from a model of it, pass its weights as --model_name_or_path" in message
