"""Every command of the README, as it stands, on small data: `torchrun` and `python` are this environment's."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.options import Options
from data.prepare import prepare_data
from metrics.records import read_records
from tests.launch import ROOT
from tests.proof import CASES

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
SHORTER = ["--max_steps", "2", "--block_size", "64", "--bf16", "false"]


@pytest.fixture
def place(model_dir: Path, train_file: Path, tmp_path: Path) -> Path:
    """A directory that holds what the commands name."""
    shutil.copytree(model_dir, tmp_path / "DIR")
    shutil.copy(train_file, tmp_path / "text.jsonl")
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    (tmp_path / "run.yaml").write_text("model_name_or_path: DIR\ntrain_file: text.jsonl\noutput_dir: my-model\n")
    return tmp_path


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' + message.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
SHAPES, PAIRS = (block.strip().splitlines() for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL))
ASK = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]


def test_fine_tuning_on_conversations(place: Path) -> None:
    """The section: the command, and the answer that `generate` then gives, and stops."""
    tokenizer = AutoTokenizer.from_pretrained(place / "DIR")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(place / "DIR")
    other = json.dumps({"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "No."}]})
    (place / "chat.jsonl").write_text(f"{SHAPES[0]}\n{other}\n" * 64)
    command = next(command for command in COMMANDS if "chat.jsonl" in command)
    longer = ["--max_steps", "100", "--learning_rate", "1e-2", "--warmup_steps", "10"]
    run = subprocess.run([*words_of(command, place), *longer], cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "MIT." in run.stdout
    answer = subprocess.run([sys.executable, "-c", ASK], cwd=place, capture_output=True, text=True, check=True)
    assert answer.stdout == "MIT.\n"


@pytest.mark.parametrize("line", SHAPES)
def test_shapes_of_conversations(line: str, place: Path) -> None:
    (place / "chat.jsonl").write_text(line)
    tokenizer = AutoTokenizer.from_pretrained(place / "DIR")
    tokenizer.chat_template = CHAT_TEMPLATE
    options = Options(train_file=str(place / "chat.jsonl"), data_cache_dir=str(place / "cache"), block_size=64)
    options.validation_split_percentage = 0
    row = prepare_data(options, tokenizer).train[0]
    assert tokenizer.decode(row.tokens[row.trained_on]).strip() == "MIT.<eos>"


def test_learning_from_preferences(place: Path) -> None:
    """The section: its command on each of its shapes, which are the same pair but for the last."""
    tokenizer = AutoTokenizer.from_pretrained(place / "DIR")
    tokenizer.chat_template = CHAT_TEMPLATE
    shutil.copytree(place / "DIR", place / "my-chat-model")
    tokenizer.save_pretrained(place / "my-chat-model")
    options = Options(train_file=str(place / "pairs.jsonl"), data_cache_dir=str(place / "cache"), objective="dpo")
    options.validation_split_percentage, options.block_size = 0, 64
    rows = []
    for line in PAIRS:
        (place / "pairs.jsonl").write_text(line)
        rows.append(prepare_data(options, tokenizer).train[0])
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    assert [tokenizer.decode(row.tokens[row.trained_on]) for row in rows] == [
        "MIT.<eos>No idea.<eos>",
        "MIT.<eos>No idea.<eos>",
        " MIT.<eos> unknown.<eos>",
    ]
    (place / "pairs.jsonl").write_text(f"{PAIRS[0]}\n" * 64)
    command = next(command for command in COMMANDS if "pairs.jsonl" in command)
    more = ["--learning_rate", "1e-3", "--logging_steps", "1"]
    run = subprocess.run([*words_of(command, place), *more], cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = [row["loss"] for row in read_records(place / "my-dpo-model" / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(0.693, abs=1e-3)
    assert losses[1] < losses[0]
    AutoModelForCausalLM.from_pretrained(place / "my-dpo-model")


def words_of(command: str, place: Path) -> list[str]:
    """The words of a README command, with its long runs made short and its host made this one."""
    words = [word.replace("/shared/output", f"{place}/shared") for word in shlex.split(command)]
    words = [str(ROOT / "train.py") if word == "train.py" else word for word in words]
    if words[0] == "torchrun":
        words[0:1] = [sys.executable, "-m", "torch.distributed.run"]
    elif words[0] == "python":
        words[0] = sys.executable
    if "--train_file" not in words and "run.yaml" not in words and "--help" not in words:
        words += ["--train_file", "text.jsonl"]
    return words if "--help" in words else [*words, *SHORTER, "--data_cache_dir", str(place / "cache")]


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in COMMANDS
        if "train.py" in command and not {"--nnodes", "chat.jsonl", "pairs.jsonl"} & set(command.split())
    ],
)
def test_command(command: str, place: Path) -> None:
    words = words_of(command, place)
    if "auto" in words:  # it continues something: the first command of that section
        first = next(other for other in COMMANDS if "--output_dir ./output" in other and "auto" not in other)
        subprocess.run(words_of(first, place), cwd=place, check=True, capture_output=True)
        words[words.index("--max_steps") + 1] = "4"
    run = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if "--help" in words:
        assert "--gradient_accumulation_steps" in run.stdout
        return
    (output_dir,) = (path.parent for path in place.glob("*/metrics.jsonl"))
    assert read_records(output_dir / "metrics.jsonl")[-1]["step"] == (4 if "auto" in words else 2)
    AutoModelForCausalLM.from_pretrained(output_dir)
    AutoTokenizer.from_pretrained(output_dir)


def test_prepare(place: Path) -> None:
    """Prepared ahead with the same options: the run itself then prepares nothing."""
    (command,) = (command for command in COMMANDS if "data.prepare" in command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [word for word in words_of(command, place) if word not in SHORTER[:2]]
    subprocess.run(words, cwd=place, env=environment, check=True, capture_output=True)
    prepared = list((place / "cache").glob("rows-*/about.json"))
    subprocess.run(words_of("python train.py --model_name_or_path DIR", place), cwd=place, check=True)
    assert list((place / "cache").glob("rows-*/about.json")) == prepared


def test_table_of_a_deepspeed_file(place: Path) -> None:
    (command,) = (command for command in COMMANDS if "compare.deepspeed" in command)
    words, environment = [sys.executable, *shlex.split(command)[1:]], {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=True)
    assert "global_batch_size 8 = micro-batch 2 x accumulation 1 x 4 ranks" in run.stdout


def test_memory(place: Path) -> None:
    """Whether it fits: a table over stages."""
    (command,) = (command for command in COMMANDS if "model.memory" in command)
    words, environment = [sys.executable, *shlex.split(command)[1:]], {**os.environ, "PYTHONPATH": str(ROOT)}
    words += ["--torch_compile", "false"]  # it takes seconds less
    run = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| FSDP (ZeRO-3) |" in run.stdout


def test_stages() -> None:
    """The options of each line of the table of stages are those of a topology that the proofs run."""
    stages = "DDP|FSDP|hybrid|offload|gradients|tensor|context"
    lines = re.findall(rf"^\| ((?:{stages})[^|]*) \|([^|]*)\|", README, re.MULTILINE)
    assert len(lines) == 10
    proved = {frozenset(case.options) for case in CASES}
    assert [name for name, options in lines if frozenset(options.strip(" `").split()) not in proved] == []


def test_ledger(place: Path) -> None:
    """The check of a run with --ledger, as the README has it."""
    (command,) = (command for command in COMMANDS if "data.ledger" in command)
    train = words_of("python train.py --model_name_or_path DIR --output_dir output --ledger", place)
    subprocess.run(train, cwd=place, check=True, capture_output=True)
    words, environment = [sys.executable, *shlex.split(command)[1:]], {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("output: 2 steps of")


def test_two_hosts(place: Path) -> None:
    """The command for several hosts, started twice as on two of them, with one rank each."""
    (command,) = (command for command in COMMANDS if "--nnodes" in command)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    words = words_of(
        command.replace("host0:29400", endpoint).replace("--nproc_per_node 8", "--nproc_per_node 1"), place
    )
    hosts = [
        subprocess.Popen([*words, "--ddp_backend", "gloo"], cwd=place, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [host.communicate()[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
    assert read_records(place / "shared" / "metrics.jsonl")[-1]["step"] == 2


def test_make_train(tmp_path: Path) -> None:
    """The quickstart itself, twice, with a few steps: the embedded corpus, two processes, the completion."""
    assert COMMANDS[:2] == ["make train", "make test"]
    options = "--max_steps 12 --warmup_steps 2 --logging_steps 5 --validation_split_percentage 1"
    options += f" --output_dir {tmp_path}/output --data_cache_dir {tmp_path}/cache"
    for _ in range(2):
        command = ["make", "train", "NPROC=2", f"PYTHON={sys.executable}", f"ARGS={options}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "--- completion of 'def ' ---" in run.stdout
        for word in ("step/s", "loss ", "lr ", "tokens/s", "/12 ["):
            assert word in run.stderr, "the progress bar"
    rows = read_records(tmp_path / "output" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 12]
    assert rows[0]["eval_loss"] > 8 > rows[-1]["eval_loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    AutoTokenizer.from_pretrained(tmp_path / "output")


def test_make_help() -> None:
    """Every target has its line."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in shown.splitlines()] == phony.split()
    assert all(len(line.split()) > 3 for line in shown.splitlines())
