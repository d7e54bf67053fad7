"""Proves docs/coming-from.md: its commands run, its files are followed or refused as it says, its options exist."""

import json
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.peers.deepspeed_keys import DECIDING_OPTION
from config.peers.names import VALUES, find_answer
from metrics.records import read_records
from tests.launch import ROOT, train
from tests.test_readme import CHAT_TEMPLATE

PAGE = (ROOT / "docs" / "coming-from.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
OURS = set(vars(Options()))
FENCE = r"```{}\n(.*?)```"
# The files that a section shows, by the name that the paragraph before ends with.
FILES: dict[str, str] = dict(re.findall(r"`([\w.]+)`[^`]*:\n\n```(?:yaml|json)\n(.*?)```", PAGE, re.DOTALL))
SMALLER = "--max_steps 2 --block_size 64 --bf16 false --preprocessing_num_workers 1 --dataloader_num_workers 0"


def fences(section: str, language: str) -> list[str]:
    found: list[str] = re.findall(FENCE.format(language), SECTIONS[section], re.DOTALL)
    return found


def rows(section: str) -> list[tuple[str, str, str]]:
    """The cells of the table of a section: theirs, ours, and the difference."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")][2:]
    assert len(lines) > 10
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(theirs, ours, difference) for theirs, ours, difference in cells]


@pytest.fixture
def place(model_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: it holds the files that the page shows, and small ones with the names that it uses."""
    shutil.copytree(model_dir, tmp_path / "DIR")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "DIR")
    for name in ("text.json", "text.jsonl"):
        shutil.copy(train_file, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    records = json.dumps([{"instruction": "Say hi.", "input": "", "output": f"Hi {number}."} for number in range(64)])
    (tmp_path / "data").mkdir()
    for name in ("alpaca.json", "data/identity.json", "data/alpaca_en_demo.json"):
        (tmp_path / name).write_text(records)
    described = {name: {"file_name": f"{name}.json"} for name in ("identity", "alpaca_en_demo")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(section: str, place: Path, more: str = "--logging_steps 1") -> tuple[str, Path]:
    """Run the one command of a section with little work. Returns what it printed, and its output directory."""
    (command,) = fences(section, "bash")
    launcher, options = command.split(" train.py ")
    ranks = re.search(r"--nproc_per_node=(\d+)", launcher)
    assert ranks
    argv = [*shlex.split(options), *SMALLER.split(), *more.split(), "--data_cache_dir", str(place / "cache")]
    output_dir = place / parse(argv, int(ranks[1])).output_dir
    outcome = train(int(ranks[1]), argv, before=partial(os.chdir, place))
    assert set(outcome.exit_codes) == {0}, outcome.output
    assert read_records(output_dir / "metrics.jsonl")[-1]["step"] == 2
    return outcome.output, output_dir


def test_hf_trainer(place: Path) -> None:
    """The command of run_clm.py, with another script."""
    theirs, ours = fences("HF Trainer", "text")[0], fences("HF Trainer", "bash")[0]
    assert theirs.replace("run_clm.py", "train.py") == ours
    _, output_dir = run("HF Trainer", place)
    AutoModelForCausalLM.from_pretrained(output_dir)


def test_deepspeed(place: Path) -> None:
    printed, _ = run("DeepSpeed", place)
    assert re.search(r"zero_optimization\.stage +2 +strategy fsdp", printed), printed


def test_llama_factory(place: Path) -> None:
    """The file is refused in the words of the page; without the two lines, it trains adapters."""
    with pytest.raises(OptionError) as error:
        parse(["sft.yaml"])
    assert str(error.value) == fences("LLaMA-Factory", "text")[0].strip()
    lines = FILES["sft.yaml"].splitlines(keepends=True)
    left = [line for line in lines if not line.startswith(("template:", "max_samples:"))]
    assert len(left) == len(lines) - 2
    (place / "sft.yaml").write_text("".join(left))
    _, output_dir = run("LLaMA-Factory", place)
    adapters = json.loads((output_dir / "adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"], adapters["lora_dropout"]) == (8, 16, 0)


def test_torchtune(place: Path) -> None:
    with pytest.raises(OptionError, match="a file of torchtune, whose _component_ keys name Python functions"):
        parse(["0.5B_full.yaml"])
    _, output_dir = run("torchtune", place)
    rates = {record["learning_rate"] for record in read_records(output_dir / "metrics.jsonl") if "loss" in record}
    assert rates == {2e-5}


def test_nanogpt(place: Path) -> None:
    """The configuration, the text of train.bin, and the run. The text is the one that the tokens were made of."""
    configuration, decode = fences("nanoGPT", "python")
    smaller = "GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=512, "
    exec(configuration.replace("GPT2Config(", smaller).replace("openai-community/gpt2", "DIR"), {})
    tokenizer = AutoTokenizer.from_pretrained("gpt2-config")
    texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    np.array(tokens, dtype=np.uint16).tofile("train.bin")
    exec(decode, {})
    assert [json.loads(line)["text"] for line in Path("train.jsonl").read_text().splitlines()] == texts
    options = parse(["gpt2.yaml"])
    assert (options.max_steps, options.adam_beta2, options.eval_steps) == (600000, 0.95, 1000)
    assert (options.lr_scheduler_type, options.min_lr) == ("cosine_with_min_lr", 6e-5)
    with pytest.raises(OptionError, match="a Python file of nanoGPT becomes a YAML file"):
        parse(["config/train_gpt2.py"])
    _, output_dir = run("nanoGPT", place, "--warmup_steps 1 --global_batch_size 4 --per_device_train_batch_size 2")
    assert AutoConfig.from_pretrained(output_dir).resid_pdrop == 0


def test_options_exist() -> None:
    """Each option of ours that the page names exists; the launcher's are named in commands only."""
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
    assert len(named) > 30
    assert named - OURS == {"num_gpus", "config"}  # of the launchers of DeepSpeed and torchtune


@pytest.mark.parametrize("section", ["HF Trainer", "LLaMA-Factory", "nanoGPT"])
def test_their_options_are_answered(section: str) -> None:
    """Each option in the first column is ours or has an answer, and is refused if and only if the page says so."""
    for theirs, ours, _ in rows(section):
        for name in re.findall(r"`([a-z]\w+)`", theirs):
            answer = VALUES.get(name) or find_answer(name)
            assert name in OURS or answer, name
            if ours == "refused":
                assert answer, name
                assert not answer.translate, name
                assert set(answer.accepted) <= {"false"}, name
            elif ours == "equal" or ours.startswith("equal;"):
                assert name in OURS, name


def test_keys_of_deepspeed() -> None:
    """Each dotted key in the first column is one that an option follows."""
    keys = [key for theirs, _, _ in rows("DeepSpeed") for key in re.findall(r"`([\w.]+)`", theirs) if "." in key]
    assert len(keys) > 6
    known = {*DECIDING_OPTION, "optimizer.type", "scheduler.params.total_num_steps"}
    assert set(keys) <= known
