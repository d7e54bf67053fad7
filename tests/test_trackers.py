"""Proves metrics/trackers.py and metrics/masking.py: what TensorBoard, wandb and SwanLab get, and what they may not do.

wandb and SwanLab run for real, in their offline modes. Without them, these tests are skipped.
"""

import importlib.util
import json
import os
import signal
import struct
import threading
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
from config import checks
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from metrics import trackers
from metrics.masking import mask, masked_options
from metrics.records import read_records
from metrics.trackers import Rows, TrackedRun, Trackers
from tests.launch import train
from tests.test_signals import send

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "swanlab")}
# Secrets in an option: the password of a URL, a token by its form, and a value that the environment has as a secret.
SECRETS = ("pa55word", "hf_abcdefghijklmnop", "plain-but-secret")


def go_offline() -> None:
    """Set the environment of a run."""
    os.environ |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "DATABASE_PASSWORD": "plain-but-secret"}


def content(directory: Path) -> bytes:
    """Every byte of every file of a directory, with the names of files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return b"\n".join(str(path.relative_to(directory)).encode() + b"\n" + path.read_bytes() for path in files)


def options_of(tmp_path: Path, *more: object) -> list[object]:
    secret = "https://user:pa55word@host/hf_abcdefghijklmnop/plain-but-secret"
    return ["--output_dir", tmp_path, "--logging_steps", 1, "--run_name", secret, *more]


@pytest.mark.fault(
    "security",
    "an option, the command line or the environment holds a token or a password, and a tracker sends options",
    "it is masked; no command line, environment, console or code is sent",
)
def test_all_numbers_and_no_secret(tiny: list[object], tmp_path: Path) -> None:
    """Each gets the numbers of metrics.jsonl, under the names of transformers. Nothing that it writes is secret."""
    names = ["tensorboard", *(name for name, installed in INSTALLED.items() if installed)]
    argv = [*tiny, *options_of(tmp_path, "--max_steps", 2, "--report_to", ",".join(names))]
    outcome = train(1, argv, before=go_offline)
    assert outcome.exit_codes == [0], outcome.output
    assert "warning: report_to" not in outcome.output
    records = read_records(tmp_path / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    for name in names:
        written = content(tmp_path / name)
        for tag in (
            "train/loss",
            "train/tokens_per_second",
            "train/peak_memory_gib",
            "eval/perplexity",
            "weight_decay",
        ):
            assert tag.encode() in written, (name, tag)
        for secret in SECRETS:
            assert secret.encode() not in written, (name, secret)
        for loss in losses:
            forms = (json.dumps(loss).encode(), struct.pack("<d", loss), struct.pack("<f", loss))
            assert any(form in written for form in forms), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_resumed_run_continues(name: str, tiny: list[object], tmp_path: Path) -> None:
    """The id of the first start, from output_dir, is that of the second."""
    if not INSTALLED[name]:
        pytest.skip(f"{name} is not installed")
    argv = [*tiny, *options_of(tmp_path, "--report_to", name, "--save_steps", 1, "--no_eval_on_start")]
    for steps in (1, 2):
        resume = ["--resume_from_checkpoint", "auto"] if steps == 2 else []
        outcome = train(1, [*argv, "--max_steps", steps, *resume], before=go_offline)
        assert outcome.exit_codes == [0], outcome.output
    id = json.loads((tmp_path / "trackers.json").read_text())[name]
    starts = sorted((tmp_path / name).glob("*run-*"))
    assert len(starts) == 2
    assert all(start.name.endswith(id) for start in starts)
    assert content(starts[0]) != content(starts[1])


def test_tensorboard_hides_later_steps(tmp_path: Path) -> None:
    """A run that resumes at step 2 replaces the values of later steps."""
    for step, values in ((0, (1.0, 2.0, 3.0)), (2, (30.0,))):
        run = TrackedRun("", "run", tmp_path, {"seed": 1}, step)
        board = trackers.TensorBoard(run)
        for index, value in enumerate(values, step + 1):
            board.log(index, {"train/loss": value})
        board.text(step, [("a prompt", "a text")])
        board.finish(0)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 30.0)]


class Fake:
    """A tracker that writes into a file of its name what it is asked for, and fails or hangs at its first record."""

    def __init__(self, what: str, run: TrackedRun) -> None:
        self.what, self.path = what, run.directory.with_suffix(".txt")

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.what == "fails":
            raise ConnectionError("no route to https://user:pa55word@host")
        if self.what == "hangs":
            threading.Event().wait()
        self._write(f"{step} {sorted(values)[0].split('/')[0]}")

    def text(self, step: int, rows: Rows) -> None:
        self._write(f"{step} {rows}")

    def finish(self, exit_code: int) -> None:
        self._write(f"exit code {exit_code}")

    def _write(self, text: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{text}\n")


def fake_trackers(*kinds: str, seconds: float = 0.5) -> None:
    """Replace the trackers by fakes of these kinds, in their order, and the time to finish."""
    trackers.KINDS = {name: partial(Fake, kind) for name, kind in zip(trackers.KINDS, kinds, strict=True)}
    trackers._import = lambda name: None
    trackers.FINISH = dict.fromkeys(trackers.FINISH, seconds)
    checks._check_trackers = lambda options: None


@pytest.mark.fault(
    "process",
    "a tracker fails or hangs in the middle of a run",
    "the run continues at its speed and ends well; the failure is said once, without secrets",
)
def test_a_tracker_that_fails_or_hangs_ends_nothing(tiny: list[object], tmp_path: Path) -> None:
    """The third gets all records and the end. Two ranks: only rank 0 has trackers."""
    argv = [*tiny, *options_of(tmp_path, "--max_steps", 3, "--report_to", "tensorboard,wandb,swanlab")]
    outcome = train(2, argv, before=partial(fake_trackers, "fails", "hangs", "works"))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert outcome.output.count("report_to tensorboard: no route to https://***@host") == 1
    assert outcome.output.count("report_to wandb: its last records were not sent in time; its files are in") == 1
    assert outcome.output.count("report_to") == 2
    told = (tmp_path / "swanlab.txt").read_text().splitlines()
    assert told == ["0 eval", "1 train", "2 train", "3 train", "3 eval", "exit code 0"]
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.fault(
    "process", "a run with a tracker fails, or a signal stops it", "the tracker gets the exit code as the run's state"
)
@pytest.mark.parametrize("code", [2, pytest.param(143, marks=pytest.mark.slow)])
def test_the_state_at_the_end(code: int, tiny: list[object], tmp_path: Path) -> None:
    argv = [*tiny, *options_of(tmp_path, "--max_steps", 2000, "--report_to", "tensorboard", "--no_eval_on_start")]
    if code == 2:
        outcome = train(1, argv, before=fail_at_step_1)
    else:
        signals = [(0, signal.SIGTERM, 0.0)]
        outcome = train(1, argv, partial(fake_trackers, "works", "", "", seconds=30), partial(send, tmp_path, signals))
    assert outcome.exit_codes == [code], outcome.output
    told = (tmp_path / "tensorboard.txt").read_text().splitlines()
    assert told[0] == "1 train"
    assert told[-1] == f"exit code {code}"


def fail_at_step_1() -> None:
    """Let the run end with a mistake of the user, after the record of step 1."""
    fake_trackers("works", "", "", seconds=30)

    def fail(*_: object) -> None:
        raise OptionError("a mistake")

    config.check_skipped = fail  # type: ignore[assignment]


def test_a_tracker_that_is_far_behind_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue does not grow without end, and says so once."""
    fake_trackers_here(monkeypatch)
    monkeypatch.setattr(trackers, "WAITING", 3)
    said: list[str] = []
    all_trackers = Trackers(parse(["--output_dir", str(tmp_path), "--report_to", "tensorboard"]), {}, 0, said.append)
    for step in range(9):
        all_trackers.log(step, {"loss": 1.0})
    all_trackers.finish(0)
    assert said == [
        "warning: report_to tensorboard: it is 3 records behind\nthe run continues without it; metrics.jsonl has all"
    ]


def fake_trackers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "KINDS", dict.fromkeys(trackers.KINDS, partial(Fake, "works")))
    monkeypatch.setattr(trackers, "_import", lambda name: None)


def test_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trackers_here(monkeypatch)
    options = parse(["--output_dir", str(tmp_path), "--report_to", "tensorboard"])
    all_trackers = Trackers(options, {}, 0, pytest.fail)
    all_trackers.text(3, [("prompt", "answer")])
    all_trackers.finish(0)
    assert (tmp_path / "tensorboard.txt").read_text().splitlines() == ["3 [('prompt', 'answer')]", "exit code 0"]


@pytest.mark.fault(
    "configuration", "output_dir/trackers.json is damaged", "a warning names it, and the trackers begin a new run"
)
@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": "../../x"}', '{"wandb": 3}', '{"wandb": {"a": "b"}}'])
def test_damaged_ids(text: str, tmp_path: Path) -> None:
    path, said = tmp_path / "trackers.json", list[str]()
    path.write_text(text)
    ids = trackers._run_ids(path, ["wandb"], 1, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"warning: {path}: ")
    assert json.loads(path.read_text()) == ids
    assert trackers._run_ids(path, ["wandb"], 2, said.append) == ids  # continued
    assert trackers._run_ids(path, ["wandb"], 0, said.append) != ids  # a new run


def test_ids_of_other_trackers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trackers.json"
    first = trackers._run_ids(path, ["wandb"], 0, pytest.fail)
    both = trackers._run_ids(path, ["swanlab"], 1, pytest.fail) | first
    assert json.loads(path.read_text()) == both
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert trackers._run_ids(path, ["wandb"], 1, pytest.fail) == {"wandb": "mine"}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:pa55word@host/a.jsonl", "https://***@host/a.jsonl"),
        ("s3://bucket/key?X-Amz-Signature=abc&X-Amz-Date=12,b.jsonl", "s3://bucket/key?***,b.jsonl"),
        ("/home/me/token=abc/x.jsonl", "/home/me/token=***/x.jsonl"),
        ('{"api_key": "abc", "a": 1}', '{"api_key": "***", "a": 1}'),
        ("runs/hf_abcdefghijkl", "runs/***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.abc", "***"),
        ("/mnt/plain-but-secret/x", "/mnt/***/x"),
        ("/data/tokens/train.jsonl", "/data/tokens/train.jsonl"),
        ("/data/tokenized=3/x", "/data/tokenized=3/x"),
        ("a.jsonl=0.7,b.jsonl=0.3", "a.jsonl=0.7,b.jsonl=0.3"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ],
)
def test_masks(text: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "plain-but-secret")
    assert mask(text) == masked
    assert masked_options(parse(["--train_file", text]))["train_file"] == masked


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--report_to", "wandb", "tensorboard"], "wandb,tensorboard"),
        (["--report_to", "wandb, TensorBoard,wandb"], "wandb,tensorboard"),
        (["--report_to=swanlab", "--max_steps", "3"], "swanlab"),
        (["--report_to", "all"], "all"),
        (["--use_wandb"], "wandb"),
        ([], "none"),
    ],
)
def test_names(argv: list[str], expected: str) -> None:
    assert parse(argv).report_to == expected


@pytest.mark.parametrize("value", ["mlflow", "wandb,none", "all,wandb", "wandb,,swanlab", ""])
def test_other_names_are_refused(value: str) -> None:
    with pytest.raises(OptionError, match="pass none, all, or some of tensorboard,wandb,swanlab"):
        parse([f"--report_to={value}" if value else "--report_to=,"])


@pytest.mark.fault(
    "configuration",
    "a tracker is asked for and is not installed",
    "exit code 2 before the model is loaded, with pip's line",
)
def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for value, packages in (("wandb,swanlab", "wandb swanlab"), ("all", "tensorboard wandb swanlab")):
        with pytest.raises(OptionError, match=f"pip install {packages}, or"):
            check(parse(["--report_to", value]), world_size=1)
    monkeypatch.setenv("RANK", "1")  # has no trackers
    check(parse(["--report_to", "wandb"]), world_size=2)


@pytest.mark.fault(
    "configuration",
    "wandb or SwanLab has no API key",
    "exit code 2 before the model is loaded: they would ask amid the run",
)
@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_no_key(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INSTALLED[name]:
        pytest.skip(f"{name} is not installed")
    for variable in [each for each in os.environ if each.startswith(("WANDB_", "SWANLAB_", "NETRC"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse(["--report_to", name])
    with pytest.raises(OptionError, match=f"{name} has no API key of a user\nrun `{name} login`"):
        check(options, world_size=1)
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "a" * 40)
    check(options, world_size=1)
    monkeypatch.delenv(f"{name.upper()}_API_KEY")
    monkeypatch.setenv(f"{name.upper()}_MODE", "offline")
    check(options, world_size=1)
    if name == "wandb":
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_BASE_URL", "https://my.host:8080")
        (tmp_path / ".netrc").write_text("machine my.host\n  login user\n  password abc\n")
        check(options, world_size=1)


@pytest.mark.fault("storage", "the directory of trackers cannot be written", "exit code 2 before the model is loaded")
def test_logging_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pytest.importorskip("tensorboard")
    with pytest.raises(OptionError, match=r"logging_dir .*/file/logs: Not a directory\npass a directory"):
        check(parse(["--report_to", "tensorboard", "--logging_dir", str(tmp_path / "file" / "logs")]), world_size=1)
    with pytest.raises(OptionError, match="only trackers write there, and report_to is none"):
        check(parse(["--logging_dir", str(tmp_path / "logs")]), world_size=1)
