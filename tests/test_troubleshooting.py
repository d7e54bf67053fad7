"""Proves docs/troubleshooting.md: each symptom shows the lines of the page, its commands run, and messages link to it.

The messages about hangs are held to the page by tests/faults/test_hangs.py.
"""

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

import data.loader
import loss.next_token
import metrics.stragglers
from checkpoint.identity import RunIdentity
from config.checks import check
from config.command_line import parse
from config.options import Options
from estimate.stages import explain_out_of_memory
from metrics.records import read_records
from tests import world
from tests.launch import ROOT, train, train_ok
from tests.test_house import FLOOR
from tests.test_numerics import SHAPE, all_masked, nan_on_rank_1
from tests.test_readme import anchors

NAME = "docs/troubleshooting.md"
PAGE = (ROOT / NAME).read_text()
SECTIONS = {title: body for title, _, body in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
OF_OTHER_PROGRAMS = {"--index-url", "--ranks", "--gpu_memory"}  # pip, python -m estimate


def form(text: str) -> str:
    """Text without what differs between runs: numbers, hashes, and how many blanks are between columns."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "...", text)
    text = re.sub(r"-?\d[\d,]*(\.\d+)?(e[-+]\d+)?", "0", text)
    return re.sub(r" +", " ", text)


def assert_shown(text: str, section: str) -> None:
    """Each line of what a run printed is in a section of the page."""
    page = form(SECTIONS[section])
    for line in filter(str.strip, text.splitlines()):
        assert form(line).strip() in page, f"{NAME}#{section} does not show: {line}"


def lines(output: str, start: str, count: int, place: Path) -> str:
    """`count` lines of what a run printed, from `start`, with paths as from the directory `place`."""
    at = output.index(start)
    return "\n".join(output[at:].splitlines()[:count]).replace(f"{place}/", "")


def command(words: str) -> str:
    """The one command of the page that has these words."""
    (found,) = [one for one in COMMANDS if words in one]
    return found


def shell(text: str, place: Path) -> str:
    """Run a command of the page in the directory `place`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        ["bash", "-c", text], cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def module(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the `main` of a `python -m` command of the page prints, in the current directory."""
    _, _, name, *argv = shlex.split(text)
    main = importlib.import_module("estimate.__main__" if name == "estimate" else name).main
    capsys.readouterr()
    main(argv)
    return capsys.readouterr().out


def table(section: str, columns: str) -> list[list[str]]:
    """The cells of the table of a section whose header begins with `columns`."""
    (rows,) = re.findall(rf"^\| {re.escape(columns)}.*\n\|[-|]+\n((?:\|.*\n)+)", f"{section}\n", re.MULTILINE)
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows.splitlines()]


# --- The page, and the messages that link to it ---------------------------------------------------------------------


def linked_sections() -> dict[str, list[str]]:
    """The anchors that texts in the source name, with the files."""
    found: dict[str, list[str]] = {}
    paths = [path for room in FLOOR for path in [*(ROOT / room).rglob("*.py"), ROOT / f"{room}.py"] if path.exists()]
    for path in paths:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if NAME in source else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for anchor in re.findall(rf"{re.escape(NAME)}#([\w-]*)", node.value):
                    found.setdefault(anchor, []).append(str(path.relative_to(ROOT)))
    return found


def test_messages_and_sections_belong_together() -> None:
    """The anchor of each message exists. The table at the top has each section, and whether a message names it."""
    found = linked_sections()
    assert len(found) >= 6
    assert found.keys() <= anchors(ROOT / NAME)
    rows = table(PAGE, "symptom | section")
    links = [re.fullmatch(r"\[(.*)\]\(#(.*)\)", section) for _, section, _ in rows]
    assert [link and link[1] for link in links] == list(SECTIONS)
    for link, (_, _, named) in zip(links, rows, strict=True):
        assert link
        assert named == ("yes" if link[2] in found else "no"), f"section {link[2]}: named by {found.get(link[2])}"


def test_options_exist() -> None:
    """Each option that the page names is one."""
    known = {f"--{field.name}" for field in dataclasses.fields(Options)} | OF_OTHER_PROGRAMS
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) - known == set()


# --- Out of memory --------------------------------------------------------------------------------------------------


def test_out_of_memory(tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = [str(word) for word in [*tiny, "--output_dir", tmp_path, "--torch_compile", "false"]]
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    said = explain_out_of_memory(argv, error)
    assert_shown(said, "Out of memory")
    assert said.endswith(f"{NAME}#out-of-memory")


def test_remedies_for_memory(tiny: list[object], tmp_path: Path) -> None:
    """The figures are those of docs/performance.md, the order is that of the speeds, and the options are accepted."""
    measured = (ROOT / "docs" / "performance.md").read_text()
    speeds = []
    for _, option, memory, speed in table(SECTIONS["Out of memory"], "| option"):
        for number in re.findall(r"\d+\.\d+ to [\d.]+|\d+\.\d(?= GiB|;|$)|\d{1,3},\d{3}", f"{memory} ; {speed}"):
            assert all(one in measured for one in number.split(" to ")), number
        for ratio, before, after in re.findall(r"([\d.]+) \(([\d,]+) to ([\d,]+)", speed):
            assert float(ratio) == round(int(after.replace(",", "")) / int(before.replace(",", "")), 2)
        speeds += [float(ratio) for ratio in re.findall(r"^([\d.]+) \(", speed)]
        words = [word for words in re.findall(r"`(--[^`]*)`", option) for word in words.split()]
        if "half of" in option:
            words = ["--per_device_train_batch_size", "2"]
        check(parse([*map(str, tiny), "--output_dir", str(tmp_path / "run"), "--torch_compile", "true", *words], 2), 2)
    assert speeds == sorted(speeds, reverse=True)
    assert len(speeds) == 5


def test_estimate(tiny: list[object], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").symlink_to(str(tiny[1]))
    (tmp_path / "text.jsonl").symlink_to(str(tiny[3]))
    shown = module(f"{command('python -m estimate').strip()} --block_size 64 --torch_compile false", capsys)
    assert "| FSDP (ZeRO-3) |" in shown


# --- Slow on several GPUs -------------------------------------------------------------------------------------------


def slow_loader() -> None:
    """On rank 1, each micro-batch takes long to make. A slow rank is reported after two records."""
    collate = data.loader.collate

    def slow(*arguments: Any, **options: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
        return collate(*arguments, **options)

    data.loader.collate = slow
    metrics.stragglers.RECORDS, metrics.stragglers.SECONDS = 2, 0.5


def test_slow_loader(tiny: list[object], tmp_path: Path) -> None:
    """The records, the command of the page and the log name the rank whose loader is slow."""
    outcome = train(2, [*tiny, *SHAPE, "--output_dir", tmp_path / "output", "--max_steps", 6], before=slow_loader)
    assert outcome.exit_codes == [0, 0], outcome.output
    records = [record for record in read_records(tmp_path / "output" / "metrics.jsonl") if "loss" in record]
    assert [record["slowest_rank"] for record in records].count(1) >= 4
    assert set(re.findall(r'"(\w+)":', SECTIONS["Slow on several GPUs"].split("```")[1])) <= records[0].keys()
    printed = shell(command("waits for data"), tmp_path)
    assert len(printed.splitlines()) == 5
    assert_shown(re.sub(r"rank \d+ \d+%$", "rank 1 71%", printed, flags=re.MULTILINE), "Slow on several GPUs")
    line = re.search(r"step \d+: rank 1 \(.*\) has been slow for", outcome.output)
    assert line, outcome.output
    message = lines(outcome.output, line[0], 3, tmp_path)
    assert message.endswith(f"{NAME}#slow-on-several-gpus")
    assert_shown(re.sub(r"\(.*?\)", "(node-b)", message), "Slow on several GPUs")


# --- Loss worse with more GPUs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_ranks(
    tiny: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal global batches: equal losses. Other ones: the start block and the ledger show it. And a trace."""
    section = "Loss worse with more GPUs"
    options = [*tiny, "--max_steps", 3, "--ledger", "--save_dtype", "bfloat16"]
    one = train_ok(1, *options, "--output_dir", tmp_path / "output")
    two = train_ok(2, *options, "--output_dir", tmp_path / "other-output", "--max_steps", 4, "--trace_steps", 2)
    monkeypatch.chdir(tmp_path)
    assert_shown(module(command("data.ledger"), capsys).splitlines()[-1], section)
    losses = [
        [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl") if "loss" in record][:2]
        for name in ("output", "other-output")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert_shown(lines(one, "global batch", 1, tmp_path), section)
    kinds = lines(two, "traced ", 20, tmp_path).replace("other-output", "output").split("\nstep ")[0]
    assert "communication" in kinds
    assert_shown(kinds, "Slow on several GPUs")

    shutil.rmtree(tmp_path / "other-output")
    larger = ["--global_batch_size", 32, "--scale_learning_rate", "sqrt", "--reference_batch_size", 16]
    more = train_ok(2, *options, *larger, "--bf16", "true", "--output_dir", tmp_path / "other-output")
    for start in ("global batch", "learning rate", "dtypes"):
        assert_shown(lines(more, start, 1, tmp_path), section)
    assert "step 1: other sequences than in other-output" in module(command("data.ledger"), capsys)
    assert "step 1: other sequences than in other-output" in SECTIONS[section]

    again = train_ok(1, *options, "--model_name_or_path", tmp_path / "output", "--output_dir", tmp_path / "again")
    assert_shown(lines(again, "weights ", 1, tmp_path), section)


@pytest.mark.slow
def test_another_seed(
    tiny: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("output", 1), ("other-output", 2)):
        train_ok(1, *tiny, "--max_steps", 1, "--ledger", "--seed", seed, "--output_dir", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert "step 1: other sequences than in other-output" in module(command("data.ledger"), capsys)


# --- NaN and skipped steps ------------------------------------------------------------------------------------------


def nan_backward(steps: set[int]) -> None:
    """Patch a rank: in `steps` its loss is finite, and its gradient is NaN, because a root has no slope at 0."""
    original, calls = loss.next_token.head_and_loss_sum, iter(range(10_000))

    def steep(hidden_BTD: Tensor, *arguments: Any) -> Tensor:
        value = original(hidden_BTD, *arguments)
        return value + (hidden_BTD.sum() * 0).sqrt() if next(calls) // 2 + 1 in steps else value

    loss.next_token.head_and_loss_sum = steep  # type: ignore[assignment]


NAN: dict[Callable[[set[int]], None], tuple[str, str]] = {
    nan_on_rank_1: ("null", "null"),
    nan_backward: ("a number", "null"),
    all_masked: ("0.0", "0.0"),
}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(one, id=one.__name__, marks=[] if one is nan_on_rank_1 else pytest.mark.slow) for one in NAN],
)
def test_skipped_steps(tiny: list[object], tmp_path: Path, fault: Callable[[set[int]], None]) -> None:
    """The command finds the first skipped step, and its fields tell the cause. The message has three lines."""
    section = "NaN and skipped steps"
    options = [*tiny, *SHAPE, "--ledger", "--output_dir", tmp_path / "output", "--max_skipped_steps", 1]
    outcome = train(2, options, before=partial(fault, {3, 4}))
    assert outcome.exit_codes == [2, 2], outcome.output
    message = lines(outcome.output, "max_skipped_steps", 3, tmp_path)
    assert message.endswith(f"{NAME}#nan-and-skipped-steps")
    assert_shown(message, section)

    found = [json.loads(line) for line in shell(command("skipped = 0"), tmp_path).splitlines()]
    assert [record["step"] for record in found] == [3, 4]
    shown = ["null" if found[0][name] is None else str(found[0][name]) for name in ("loss", "grad_norm")]
    expected = NAN[fault]
    assert expected in [tuple(row[:2]) for row in table(SECTIONS[section], "`loss` | `grad_norm`")]
    assert shown[1] == expected[1]
    assert shown[0] == expected[0] if expected[0] != "a number" else float(shown[0]) > 1
    if fault is nan_on_rank_1:
        assert json.dumps(found[0]) in SECTIONS[section]


@pytest.mark.slow
def test_find_sequences(tiny: list[object], tmp_path: Path) -> None:
    """From a step to its sequences, and from a sequence to its text."""
    section = "NaN and skipped steps"
    options = [*tiny, *SHAPE, "--max_steps", 3]
    train_ok(2, *options, "--ledger", "--output_dir", tmp_path / "output")
    ranks = shell(command("grep"), tmp_path).splitlines()
    sequences = [tuple(entry) for rank in ranks for entry in json.loads(rank)["sequences"]]
    assert len(ranks) == 2
    assert len(sequences) == 16
    lengths = {number: tokens for number, tokens, _ in sequences}
    assert any(rank.startswith(re.findall(r'^{"step": 3, "sequences".*', SECTIONS[section], re.M)[0]) for rank in ranks)
    words = re.findall(r"`(--show_examples 18 .*?)`", SECTIONS[section])[0].split()
    output = train_ok(1, *options, *words, "--output_dir", tmp_path / "look")
    (header,) = re.findall(r"^--- sequence 17: \d+ tokens, .* ---$", output, re.MULTILINE)
    assert header in SECTIONS[section]
    assert f"{lengths[17]} tokens" in header


# --- Gibberish after fine-tuning ------------------------------------------------------------------------------------


def chat(tiny: list[object], place: Path, template: str, *more: object) -> Any:
    """A run on conversations with a template."""
    (place / "template.jinja").write_text(template)
    user, answer = ({"role": role, "content": text} for role, text in (("user", "say 0"), ("assistant", "0")))
    (place / "chat.jsonl").write_text((json.dumps({"messages": [user, answer]}) + "\n") * 40)
    options = ["--train_file", place / "chat.jsonl", "--chat_template", place / "template.jinja", "--max_steps", 1]
    return train(1, [*tiny, *options, "--output_dir", place / "output", *more])


GOOD = world.without_markers(world.PLAIN).replace("<|im_end|>", "<eos>")
TEMPLATES = {
    "nothing ends an answer": (GOOD.replace("+ '<eos>' }}", "}}"), 2, "it writes nothing after an answer"),
    "no special token": (GOOD.replace("<eos>", "###"), 0, "no special token ends a turn"),
}


def test_shown_examples(tiny: list[object], tmp_path: Path) -> None:
    outcome = chat(tiny, tmp_path, GOOD, "--show_examples", 1)
    assert outcome.exit_codes == [0], outcome.output
    assert_shown(lines(outcome.output, "--- sequence 0", 5, tmp_path), "Gibberish after fine-tuning")


@pytest.mark.parametrize(("template", "code", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_no_end_of_a_turn(tiny: list[object], tmp_path: Path, template: str, code: int, words: str) -> None:
    outcome = chat(tiny, tmp_path, template, "--show_examples", 1)
    assert outcome.exit_codes == [code], outcome.output
    message = lines(outcome.output, f"chat_template: {words}", 2, tmp_path)
    assert message.endswith(f"{NAME}#gibberish-after-fine-tuning")
    assert_shown(message, "Gibberish after fine-tuning")
    if not code:
        assert "«0###»" in outcome.output, "the answer ends without a special token"


def test_text_and_a_high_learning_rate(tiny: list[object], tmp_path: Path) -> None:
    """The start block says that all of a text is trained on. A high learning rate raises the validation loss."""
    output = train_ok(1, *tiny, "--max_steps", 4, "--learning_rate", 3, "--output_dir", tmp_path)
    assert re.search(r"documents \(text\), .* 100\.0% of them trained on", output)
    before, after = (
        record["eval_loss"] for record in read_records(tmp_path / "metrics.jsonl") if "eval_loss" in record
    )
    assert after > before


# --- Resume refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run in `output`, which has a checkpoint of step 2."""
    place = tmp_path_factory.mktemp("saved")
    train_ok(1, *tiny, "--max_steps", 2, "--output_dir", place / "output")
    return place


REFUSALS = table(SECTIONS["Resume refused"], "message | remedy")
CHANGES: dict[str, list[object]] = {
    "seed": ["--seed", 7],
    "global_batch_size": ["--global_batch_size", 8],
    "optim": ["--optim", "muon"],
    "data_fingerprint": ["--block_size", 32],
    "model_fingerprint": [],  # another model
    "use_peft": ["--use_peft"],
}


def refuse(output: str, place: Path) -> str:
    """The two lines of a refused resume; both are in one row of the page."""
    message = lines(output, "resume_from_checkpoint", 2, place)
    refusal, remedy = form(message).splitlines()
    cells = [(form(row[0].strip("`")), form(row[1].strip("`"))) for row in REFUSALS]
    assert any(said in refusal and remedy == f"{do}; see {NAME}#resume-refused" for said, do in cells), message
    return message


@pytest.mark.parametrize(
    "name",
    [name if name in ("seed", "data_fingerprint") else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_resume_refused(tiny: list[object], saved: Path, model_dir: Path, tmp_path: Path, name: str) -> None:
    words: list[object] = [*CHANGES[name]]
    if name == "model_fingerprint":
        config = PretrainedConfig.get_config_dict(model_dir)[0] | {"intermediate_size": 48}
        other = importlib.import_module("transformers").Qwen3Config(**config)
        words = ["--model_name_or_path", world.make_family(other, tmp_path / "model", model_dir)]
        words += ["--tokenizer_name", model_dir]
    resumed = ["--output_dir", saved / "output", "--max_steps", 4, "--resume_from_checkpoint", "auto"]
    outcome = train(1, [*tiny, *resumed, *words])
    assert outcome.exit_codes == [2], outcome.output
    message = refuse(outcome.output, saved)
    assert f"{name} was " in message
    if name == "seed":
        assert message in SECTIONS["Resume refused"]
    if name in Options.__dataclass_fields__ and name != "use_peft":
        assert f"'{name}': " in shell(command("state.json"), saved)


def test_each_field_of_the_identity_is_in_the_page() -> None:
    fields = {field.name for field in dataclasses.fields(RunIdentity)}
    assert fields <= CHANGES.keys()
    assert all(any(f"`{name} was " in said for said, _ in REFUSALS) for name in CHANGES)


def test_damaged(tiny: list[object], saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "output", tmp_path / "output")
    next((tmp_path / "output" / "checkpoint-2" / "model").iterdir()).write_bytes(b"")
    outcome = train(1, [*tiny, "--output_dir", tmp_path / "output", "--resume_from_checkpoint", "auto"])
    assert outcome.exit_codes == [2], outcome.output
    assert "are damaged" in refuse(outcome.output, tmp_path)


def other_seed() -> None:
    """Give rank 1 another seed."""
    sys.argv += ["--seed", "7"] if os.environ["RANK"] == "1" else []


def test_ranks_that_differ(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(2, [*tiny, "--output_dir", tmp_path], before=other_seed)
    assert outcome.exit_codes == [2, 2], outcome.output
    refusal, remedy = lines(outcome.output, "ranks [1]", 2, tmp_path).splitlines()
    assert [f"`{refusal}`", f"`{remedy}`"] in REFUSALS


@pytest.mark.slow
def test_accepted(tiny: list[object], saved: Path, tmp_path: Path) -> None:
    """Another number of ranks, strategy, learning rate, schedule and number of steps."""
    shutil.copytree(saved / "output", tmp_path / "output")
    words = [
        "--learning_rate",
        1e-3,
        "--lr_scheduler_type",
        "constant_with_warmup",
        "--strategy",
        "fsdp",
        "--max_steps",
        3,
    ]
    output = train_ok(2, *tiny, *words, "--output_dir", tmp_path / "output", "--resume_from_checkpoint", "auto")
    assert "resumed from " in output
