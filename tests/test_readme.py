"""Every command of README.md and of the pages of docs/, unchanged, on small data. Commands run in the launcher of
the tests, and two of them under torchrun itself. test_coming_from.py runs those of docs/coming-from.md.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tokenize
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.options import Options
from data.prepare import prepare_data
from metrics.records import read_records
from tests import world
from tests.launch import ROOT, train
from tests.proof import CASES, MIXTURE_CASES

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCKS = [(page, block) for page, text in PAGES.items() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
COMMANDS = [(page, line) for page, block in BLOCKS for line in block.strip().splitlines()]
SHORTER = ["--max_steps", "2", "--block_size", "64", "--bf16", "false"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' + message.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


def json_lines(page: str) -> list[str]:
    (block,) = re.findall(r"```json\n(.*?)```", PAGES[page], re.DOTALL)
    return block.strip().splitlines()


SHAPES, PAIRS = json_lines("chat.md"), json_lines("preferences.md")
(ASK,) = re.findall(r"```python\n(.*?)```", PAGES["chat.md"], re.DOTALL)
(STEP,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data that the commands share."""
    return tmp_path_factory.mktemp("cache")


TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")


@pytest.fixture
def place(model_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: it holds what the commands name."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    for name in ("DIR", "my-chat-model"):
        shutil.copytree(model_dir, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    world.make_mixture(tmp_path / "MIXTURE_DIR", model_dir)
    shutil.copy(train_file, tmp_path / "text.jsonl")
    shutil.copy(train_file, tmp_path / "more.jsonl")
    other = json.dumps({"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "No."}]})
    (tmp_path / "chat.jsonl").write_text(f"{SHAPES[0]}\n{other}\n" * 64)
    (tmp_path / "pairs.jsonl").write_text(f"{PAIRS[0]}\n" * 64)
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Hi", "input": "", "output": "Hello."}] * 64))
    described = {"file_name": "chat.jsonl", "formatting": "openai", "columns": {"messages": "messages"}}
    described["tags"] = dict(zip(TAGS, ("role", "content", "user", "assistant"), strict=True))
    data_sets = {"alpaca_en": {"file_name": "alpaca.json"}, "identity": described}
    (tmp_path / "dataset_info.json").write_text(json.dumps(data_sets))
    (tmp_path / "run.yaml").write_text("model_name_or_path: DIR\ntrain_file: text.jsonl\noutput_dir: my-model\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(words: str, page: str | None = None) -> str:
    """The one command that contains `words`, of all pages or of one."""
    (command,) = {line for name, line in COMMANDS if words in line and page in (None, name)}
    return command


def options_of(command: str, cache: Path) -> list[str]:
    """The options of a command of train.py or of `python -m`, with a long run made short."""
    words = shlex.split(command.replace("/shared/", f"{Path.cwd()}/"))
    words = words[words.index("train.py") + 1 :] if "train.py" in words else words[3:]
    return words if "--help" in words else [*words, *SHORTER, "--data_cache_dir", str(cache)]


def run(command: str, cache: Path, *more: str) -> str:
    """Run a command of train.py on as many ranks as it asks for, in the current directory. Returns what it printed."""
    ranks = re.search(r"--nproc_per_node=(\d+)", command)
    argv = [*options_of(command, cache), *more]
    outcome = train(int(ranks[1]) if ranks else 1, argv, before=partial(os.chdir, Path.cwd()))
    assert set(outcome.exit_codes) == {0}, outcome.output
    return outcome.output


def run_module(command: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run `python -m MODULE` in this process: its `main`. Returns what it printed."""
    name = shlex.split(command)[2]
    package = importlib.util.find_spec(name)
    module = importlib.import_module(f"{name}.__main__" if package and package.submodule_search_locations else name)
    capsys.readouterr()
    assert not module.main(argv)
    return capsys.readouterr().out


def test_fine_tuning_on_conversations(place: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/chat.md: the command, and the answer that `generate` then gives, and stops."""
    command = find("chat.jsonl", "chat.md")
    shutil.rmtree(place / "my-chat-model")
    assert "MIT." in run(command, cache, "--max_steps", "100", "--learning_rate", "1e-2", "--warmup_steps", "10")
    capsys.readouterr()
    exec(ASK, {})
    assert capsys.readouterr().out == "MIT.\n"


@pytest.mark.parametrize("line", SHAPES)
def test_shapes_of_conversations(line: str, place: Path, cache: Path) -> None:
    (place / "chat.jsonl").write_text(line)
    options = Options(train_file=str(place / "chat.jsonl"), data_cache_dir=str(cache), block_size=64)
    options.validation_split_percentage = 0
    tokenizer = AutoTokenizer.from_pretrained(place / "DIR")
    sequence = prepare_data(options, tokenizer).train[0]
    assert tokenizer.decode(sequence.tokens[sequence.trained_on]).strip() == "MIT.<eos>"


def test_learning_from_preferences(place: Path, cache: Path) -> None:
    """docs/preferences.md: its command on each of its shapes, which are the same pair but for the last."""
    tokenizer = AutoTokenizer.from_pretrained(place / "DIR")
    options = Options(train_file=str(place / "pairs.jsonl"), data_cache_dir=str(cache), objective="dpo")
    options.validation_split_percentage, options.block_size = 0, 64
    sequences = []
    for line in PAIRS:
        (place / "pairs.jsonl").write_text(line)
        sequences.append(prepare_data(options, tokenizer).train[0])
    assert sequences[0].tokens.tolist() == sequences[1].tokens.tolist()
    assert [tokenizer.decode(sequence.tokens[sequence.trained_on]) for sequence in sequences] == [
        "MIT.<eos>No idea.<eos>",
        "MIT.<eos>No idea.<eos>",
        " MIT.<eos> unknown.<eos>",
    ]
    (place / "pairs.jsonl").write_text(f"{PAIRS[0]}\n" * 64)
    run(find("pairs.jsonl", "preferences.md"), cache, "--learning_rate", "1e-3", "--logging_steps", "1")
    losses = [record["loss"] for record in read_records(place / "my-dpo-model" / "metrics.jsonl") if "loss" in record]
    assert losses[0] == pytest.approx(0.693, abs=1e-3)
    assert losses[1] < losses[0]
    AutoModelForCausalLM.from_pretrained(place / "my-dpo-model")


IN_OTHER_TESTS = ("--nnodes", "--show_examples", "python train.py --objective dpo", "my-adapters")
RUNS = {
    line: None
    for page, line in COMMANDS
    if "train.py" in line and page != "coming-from.md" and not any(words in line for words in IN_OTHER_TESTS)
}


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=pytest.mark.slow if "tensorboard" in line else []) for line in RUNS]
)
def test_command(command: str, place: Path, cache: Path) -> None:
    if "--help" in command:
        assert "--gradient_accumulation_steps" in run(command, cache)
        return
    steps = 2
    if "--resume_from_checkpoint auto" in command:  # it continues the same command without this option
        run(command.replace("--resume_from_checkpoint auto", ""), cache)
        steps = 4
    trained = place / "my-chat-model"
    if f"--output_dir {trained.name}" in command:
        shutil.rmtree(trained)
    run(command, cache, "--max_steps", str(steps))
    (output_dir,) = (path.parent for path in place.glob("*/metrics.jsonl"))
    assert read_records(output_dir / "metrics.jsonl")[-1]["step"] == steps
    AutoModelForCausalLM.from_pretrained(output_dir)
    AutoTokenizer.from_pretrained(output_dir)


def test_prepare(place: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepared ahead with the same options: the run itself then prepares nothing."""
    cache = place / "cache"
    command = find("data.prepare")
    run_module(command, [word for word in options_of(command, cache) if word not in SHORTER[:2]], capsys)
    prepared = list(cache.glob("*/about.json"))
    assert len(prepared) == 1
    run("python train.py --model_name_or_path DIR --train_file text.jsonl", cache)
    assert list(cache.glob("*/about.json")) == prepared


def test_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/report.md: the page of one run, and of two."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    for name in ("output", "other-output"):
        (place / name).mkdir()
        (place / name / "metrics.jsonl").write_text('{"step": 1, "tokens_seen": 64, "loss": 5.9}\n')
    for words, written in (("output", "output/report.html"), ("--png", "compared.html\ncompared.png")):
        command = next(line for page, line in COMMANDS if page == "report.md" and line.endswith(words))
        assert run_module(command, shlex.split(command)[3:], capsys) == f"{written}\n"


def test_table_of_a_deepspeed_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = find("python -m config")
    shown = run_module(command, shlex.split(command)[3:], capsys)
    assert "global_batch_size 8 = micro-batch 2 x accumulation 1 x 4 ranks" in shown


@pytest.mark.parametrize("page", ["README.md", "lora.md"])
def test_memory(place: Path, capsys: pytest.CaptureFixture[str], page: str) -> None:
    """Whether it fits: a table over stages."""
    command = find("python -m estimate", page)
    # Without compiling, it takes seconds less.
    argv = [*shlex.split(command)[3:], "--train_file", "text.jsonl", *SHORTER, "--torch_compile", "false"]
    assert "| FSDP (ZeRO-3) |" in run_module(command, argv, capsys)


def test_lora(place: Path, cache: Path) -> None:
    """docs/lora.md and README.md: the command for a small GPU. PEFT, if it is here, loads the adapters."""
    assert "predicted" in run(find("my-adapters"), cache)
    assert (place / "my-adapters" / "adapter_config.json").exists()
    pytest.importorskip("peft")
    (load,) = re.findall(r"```python\n(.*?)```", PAGES["lora.md"], re.DOTALL)
    found: dict[str, Any] = {}
    exec(load, found)
    assert type(found["model"]).__name__ == "PeftModelForCausalLM"


STAGES = r"^\| ((?:DDP|FSDP|hybrid|offload|gradients|tensor|context|expert)[^|]*) \|([^|]*)\|"


@pytest.mark.parametrize(("page", "count"), [("README.md", 11), ("parallelism.md", 10)])
def test_stages(page: str, count: int) -> None:
    """The options of each line of the table of stages are those of a topology that the proofs run."""
    lines = re.findall(STAGES, PAGES[page], re.MULTILINE)
    assert len(lines) == count
    proved = {frozenset(case.options) for case in (*CASES, *MIXTURE_CASES)}
    assert [name for name, options in lines if frozenset(options.strip(" `").split()) not in proved] == []


def test_ledger(place: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/output.md: the check of a run with --ledger."""
    run("python train.py --model_name_or_path DIR --train_file text.jsonl --output_dir output --ledger", cache)
    command = find("data.ledger")
    assert run_module(command, shlex.split(command)[3:], capsys).startswith("output: 2 steps of")


def torchrun(command: str, cache: Path) -> "subprocess.Popen[str]":
    """Start a command with torchrun itself, from this environment."""
    words = shlex.split(command)
    words = words[: words.index("train.py")]
    argv = [sys.executable, "-m", "torch.distributed.run", *words[1:], str(ROOT / "train.py")]
    return subprocess.Popen([*argv, *options_of(command, cache)], stderr=subprocess.PIPE, text=True)


def test_torchrun(place: Path, cache: Path) -> None:
    """The first command of docs/parallelism.md with torchrun itself, on two ranks."""
    command = find("--output_dir ./output", "parallelism.md")
    run = torchrun(command.replace("--nproc_per_node=4", "--nproc_per_node=2"), cache)
    errors = run.communicate()[1]
    assert run.returncode == 0, errors
    assert read_records(place / "output" / "metrics.jsonl")[-1]["step"] == 2


@pytest.mark.slow
def test_two_nodes(place: Path, cache: Path) -> None:
    """The command for several nodes, started twice as on two of them, with one rank each."""
    command = find("--nnodes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    command = command.replace("node0:29400", endpoint).replace("--nproc_per_node 8", "--nproc_per_node 1")
    nodes = [torchrun(f"{command} --ddp_backend gloo", cache) for _ in range(2)]
    errors = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert read_records(place / "output" / "metrics.jsonl")[-1]["step"] == 2


def code_lines(text: str) -> list[str]:
    """The lines of Python code without comments and indentation."""
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    lines = text.splitlines()
    for comment in comments:
        row, column = comment.start
        lines[row - 1] = lines[row - 1][:column]
    return [line.strip() for line in lines if line.strip()]


def test_optimizer_step() -> None:
    """Each code line of the step that README.md shows is a line of the loop of train.py, in the same order."""
    loop = code_lines((ROOT / "train.py").read_text())
    shown = code_lines(STEP)
    assert 15 < len(shown) < 25
    assert shown[0].startswith("def forward_backward(")
    start = 0
    for line in shown:
        assert line in loop[start:], f"not in train.py, or in another order: {line}"
        start = loop.index(line, start) + 1


@pytest.mark.slow
def test_make_train(tmp_path: Path) -> None:
    """The quickstart itself, twice, with a few steps: the embedded corpus, two processes, the completion."""
    options = "--max_steps 12 --warmup_steps 2 --logging_steps 5 --validation_split_percentage 1"
    options += f" --output_dir {tmp_path}/output --data_cache_dir {tmp_path}/cache"
    for _ in range(2):
        command = ["make", "train", "NPROC=2", f"PYTHON={sys.executable}", f"ARGS={options}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "--- completion of 'def ' ---" in run.stdout
        for line in (r"step 5/12: loss \d\.\d+, lr ", r"step 12/12: loss .* tokens/s, 0:00:00 left"):
            assert re.search(line, run.stdout), "the plain lines of a run without a terminal"
    records = read_records(tmp_path / "output" / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [5, 10, 12]
    assert records[0]["eval_loss"] > 8 > records[-1]["eval_loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    AutoTokenizer.from_pretrained(tmp_path / "output")


def make(*words: str) -> str:
    """What make prints; recipes of a dry run (-n) are not executed."""
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", "NPROC=2", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_train_command() -> None:
    """What `make train` would run."""
    assert [line for _, line in COMMANDS[:2]] == ["make train", "make chat"]
    shown = make("-n", "train", "ARGS=--max_steps 3")
    assert "torchrun --nproc_per_node=$processes train.py --overwrite_output_dir --max_steps 3" in shown
    assert "processes=2" in shown


def test_make_help() -> None:
    """Every target has its line."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = make("help")
    assert [line.split()[1] for line in shown.splitlines()] == phony.split()
    assert all(len(line.split()) > 3 for line in shown.splitlines())


MARKDOWN = [path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]]


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings: list[str] = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=str)
def test_links(page: Path) -> None:
    """The target of each relative link exists, and so does its heading."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert missing == []


def test_readme_links_what_it_names() -> None:
    """Each file, folder or page that README.md names is a link."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = re.findall(r"(?<!\[)`([\w/.-]+)`", text)
    assert [name for name in named if "/" in name.strip("/") and (ROOT / name).exists()] == []
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if f"(docs/{page})" not in README} == set()


def test_every_test_file_is_listed() -> None:
    """docs/tests.md names each test file."""
    names = {path.name for path in ROOT.glob("tests/**/test_*.py")}
    assert {name for name in names if name not in PAGES["tests.md"]} == set()
