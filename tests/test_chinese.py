"""Proves the Chinese pages: each has the code, the structure, the links and the numbers of its English page, and uses
the names of docs/glossary.md. The commands of README.zh-CN.md run.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from data.prepare import prepare_data
from estimate.memory import gib, host_memory, predict
from metrics.records import read_records
from model.build import build_model, load_config_and_tokenizer
from tests.launch import ROOT, train
from tests.test_readme import CHAT_TEMPLATE, STAGES, run_module
from tests.test_readme import COMMANDS as README_COMMANDS

BOOK = ROOT / "docs" / "book"
ENGLISH = {ROOT / "docs" / "troubleshooting.zh-CN.md": ROOT / "docs" / "troubleshooting.md"} | {
    path: BOOK / path.name for path in sorted((BOOK / "zh").glob("*.md"))
}
CHINESE = {english: chinese for chinese, english in ENGLISH.items()}
HOME = ROOT / "README.zh-CN.md"  # it is written for its readers, and mirrors no page

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
each_page = pytest.mark.parametrize("page", ENGLISH, ids=lambda path: path.stem)
all_pages = pytest.mark.parametrize("page", [HOME, *ENGLISH], ids=lambda path: path.stem)

# Words that a dictionary gives, and the name that engineers use.
WRONG = {
    "令牌": "token",
    "检查站": "checkpoint",
    "存档点": "checkpoint",
    "纪元": "epoch",
    "梯度累计": "梯度累积",
    "微批量": "微批次",
    "全局批量": "全局批次",
    "碎片": "分片",
    "平行": "并行",
    "全减": "all-reduce",
    "优化步骤": "优化器步",
    "账本": "台账",
    "集体通信": "集合通信",
}
# English words that also have an everyday sense, in which they have another name.
EVERYDAY = {"block", "mixture", "store", "trained on", "unit"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and content. Labels of a drawing may be translated."""
    found = [(language, content) for _, language, content in FENCE.findall(page.read_text())]
    return [(language, re.sub(r'"[^"]*"', '""', text) if language == "mermaid" else text) for language, text in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks, and without the line of a Chinese page that links the English one."""
    text = FENCE.sub("", page.read_text())
    return text.replace(f"\n{english_link(page)}\n", "", 1) if page in ENGLISH else text


def words(page: Path) -> str:
    """What a reader reads: without code and the targets of links."""
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", prose(page)))


def english_link(page: Path) -> str:
    return f"[English]({'../' if page.parent.name == 'zh' else ''}{ENGLISH[page].name})"


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ .*$", prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def links(page: Path) -> Counter[str]:
    """The targets of links. A Chinese page counts as its English one, and so do its anchors."""
    found: Counter[str] = Counter()
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, place = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if target.startswith("https://"):
            found[target] += 1
        else:
            if path in ENGLISH:
                places = dict(zip(map(anchor, headings(path)), map(anchor, headings(ENGLISH[path])), strict=True))
                path, place = ENGLISH[path], places[place] if place else ""
            found[f"{path.relative_to(ROOT)}#{place}"] += 1
    return found


@each_page
def test_same_code(page: Path) -> None:
    """The same blocks in the same order, and the same file before a block of code."""
    assert blocks(page) == blocks(ENGLISH[page])
    comments = [re.findall(r"<!-- .* -->", path.read_text()) for path in (page, ENGLISH[page])]
    assert comments[0] == comments[1]


@each_page
def test_same_structure(page: Path) -> None:
    """The same levels of headings, folded answers, items of lists, and cells of tables; the English page is linked."""
    assert page.read_text().split("\n")[2] == english_link(page)
    for pattern in (r"^#+(?= )", r"</?details>|</?summary>", r"^(?:-|\d\.)(?= )", r"^\|[-|]+$"):
        here, there = (re.findall(pattern, prose(path), re.MULTILINE) for path in (page, ENGLISH[page]))
        assert here == there, pattern
    rows = [re.findall(r"^\|.*\|$", prose(path), re.MULTILINE) for path in (page, ENGLISH[page])]
    assert [row.count("|") for row in rows[0]] == [row.count("|") for row in rows[1]]


@each_page
def test_same_links(page: Path) -> None:
    """A link goes where that of the English page goes, or to its Chinese counterpart, if there is one."""
    assert links(page) == links(ENGLISH[page])
    untranslated = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(page))
        if (page.parent / target).resolve() in CHINESE
    ]
    assert untranslated == []


@each_page
def test_same_names_and_numbers(page: Path) -> None:
    """Each name in `code` is on both pages, and each number of the English page is on the Chinese one."""
    both = (page, ENGLISH[page])
    here, there = ({" ".join(name.split()) for name in re.findall(r"`[^`]+`", prose(path))} for path in both)
    assert here == there
    here, there = (set(re.findall(r"\d[\d,.]*\d|\d", words(path))) for path in both)
    assert there - here == set()


def glossary() -> dict[str, list[str]]:
    """The Chinese names of each term, which parentheses and semicolons separate: U+FF08, U+FF09 and U+FF1B."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(rows) > 100
    return {term: [name for name in re.split(r"[\uff08\uff09\uff1b]", names) if name] for term, names in rows[2:]}


@each_page
def test_terms_of_the_glossary(page: Path) -> None:
    """Each term of the English page is on the Chinese page, by a name of the glossary."""
    english, chinese = words(ENGLISH[page]), words(page).lower()
    missing = {
        term: names
        for term, names in glossary().items()
        if term not in EVERYDAY
        and re.search(rf"\b{re.escape(term.split(' (')[0])}(e?s)?\b", english, re.IGNORECASE)
        and not any(name.lower() in chinese for name in names)
    }
    assert missing == {}


@all_pages
def test_words_of_engineers(page: Path) -> None:
    found = {wrong: right for wrong, right in WRONG.items() if wrong in page.read_text()}
    assert found == {}, "the second word is the one to use"


@all_pages
def test_typography(page: Path) -> None:
    """A blank between Chinese and Latin text, and Chinese punctuation in Chinese text."""
    text = re.sub(r"`[^`\n]*`", "x", re.sub(r"\]\([^)]*\)", "]", prose(page)))
    text = re.sub(r"!?\[|[*\]]|</?\w+>", "", text)
    assert re.findall(r".{0,9}(?:[一-龥][A-Za-z0-9]|[A-Za-z0-9%][一-龥]).{0,9}", text) == []
    assert re.findall(r".{0,9}(?:[一-龥][,.;:?!()]|[,;:?!()][一-龥]).{0,9}", text) == []


def test_contents() -> None:
    """Each page of the book is in Chinese, and the Chinese contents link each chapter."""
    assert [path.name for path in sorted((BOOK / "zh").glob("*.md"))] == [p.name for p in sorted(BOOK.glob("*.md"))]
    linked = re.findall(r"^\| \d \| \[[^]]+\]\(([^)]+)\) \|", (BOOK / "zh" / "README.md").read_text(), re.MULTILINE)
    assert linked == [path.name for path in sorted((BOOK / "zh").glob("[1-8]-*.md"))]


# --- README.zh-CN.md ------------------------------------------------------------------------------------------------


def home_blocks(language: str) -> list[str]:
    return [content for found, content in blocks(HOME) if found == language]


COMMANDS = [line for block in home_blocks("bash") for line in block.splitlines()]
OF_README = [line for line in COMMANDS if line.startswith("make ") or "--nnodes" in line]
TRAINING = [line for line in COMMANDS if "train.py" in line and line not in OF_README]
TWO_CARDS, RESUMED = (line for line in TRAINING if "--output_dir saves/qwen3-1.7b " in line)
DEEPSPEED, DATASET_INFO = (block for block in home_blocks("json") if block.startswith("{\n"))
(RECORDS,) = (block.splitlines() for block in home_blocks("json") if block.startswith('{"'))
SMALLER = "--max_steps 2 --bf16 false --validation_split_percentage 0 --preprocessing_num_workers 1"
OF_OTHERS = {"num_gpus", "local_rank", "nproc_per_node", "use_lora"}  # of launchers and of Qwen
# Hidden size, intermediate size, layers, heads; tied embeddings.
SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
}


@pytest.fixture
def place(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: small models and data with the names that the page uses, and the files that it shows."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    for name in SHAPES:
        shutil.copytree(model_dir, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    for name, record in (("sft.jsonl", RECORDS[2]), ("my-data/part.jsonl", RECORDS[3])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{record}\n" * 400)
    (tmp_path / "data").mkdir()
    for name, record in (("alpaca_zh", RECORDS[0]), ("sharegpt_zh", RECORDS[1])):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([json.loads(record)] * 200))
    (tmp_path / "data" / "dataset_info.json").write_text(DATASET_INFO)
    (tmp_path / "ds.json").write_text(DEEPSPEED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, place: Path, *more: str) -> tuple[str, Path]:
    """Run a command of train.py with little work. Returns what it printed, and its output directory."""
    launcher, options = command.split(" train.py ")
    (ranks,) = map(int, re.findall(r"--nproc_per_node=(\d+)", launcher))
    shorter = [] if "--model_max_length" in options else ["--block_size", "256"]
    argv = [*shlex.split(options), *SMALLER.split(), *shorter, "--data_cache_dir", str(place / "cache"), *more]
    outcome = train(ranks, argv, before=partial(os.chdir, place))
    assert outcome.exit_codes == [0] * ranks, outcome.output
    return outcome.output, place / parse(argv, ranks).output_dir


@pytest.mark.parametrize("command", TRAINING)
def test_options_of_commands(command: str, place: Path) -> None:
    """All checks accept each command."""
    (ranks,) = map(int, re.findall(r"--nproc_per_node=(\d+)", command))
    check(parse([*shlex.split(command.split(" train.py ")[1]), "--bf16", "false"], ranks), ranks)


ALONE = [line for line in TRAINING if line not in (TWO_CARDS, RESUMED)]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(line, id=str(n), marks=[] if "my-data" in line else pytest.mark.slow)
        for n, line in enumerate(ALONE)
    ],
)
def test_command(command: str, place: Path) -> None:
    """Each command trains a model, and prints the lines of the page that follow it."""
    printed, output_dir = run(command, place)
    assert read_records(output_dir / "metrics.jsonl")[-1]["step"] == 2
    AutoModelForCausalLM.from_pretrained(output_dir)
    if "--data_path" in command:
        (notes,) = (block for block in home_blocks("text") if block.startswith("data_path"))
        assert set(notes.splitlines()) <= set(printed.splitlines())


@pytest.mark.slow
def test_two_cards_and_a_resume(place: Path) -> None:
    """The second command continues the first, and the files of the page are there."""
    run(TWO_CARDS, place)
    printed, output_dir = run(RESUMED, place, "--max_steps", "4")
    assert "resumed from saves/qwen3-1.7b/checkpoint-2" in printed
    assert read_records(output_dir / "metrics.jsonl")[-1]["step"] == 4
    for name in ("model.safetensors", "config.json", "checkpoint-4", "metrics.jsonl", "events.jsonl"):
        assert (output_dir / name).exists()
        assert name in HOME.read_text().replace("checkpoint-步数", "checkpoint-4")


def test_other_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of the DeepSpeed file, the forecast, and commands that README.md has, too."""
    assert [line for _, line in README_COMMANDS if line in OF_README] == OF_README
    config, estimate = (line for line in COMMANDS if line not in OF_README and line not in TRAINING)
    shown = run_module(config, shlex.split(config)[3:], capsys)
    (lines,) = (block.splitlines() for block in home_blocks("text") if "zero_optimization" in block)
    # The lines of the page are indented as those of the table.
    assert set(lines) <= set(shown.splitlines())
    shorter = ["--block_size", "64", "--torch_compile", "false"]
    assert "| FSDP (ZeRO-3) |" in run_module(estimate, [*shlex.split(estimate)[3:], *shorter], capsys)


def test_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher adds is accepted if it is right, and refused in the words of the page if not."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse(["--local_rank=1", "--train_file", "sft.jsonl"], 4).train_file == "sft.jsonl"
    with pytest.raises(OptionError) as error:
        parse(["--local_rank", "0"], 4)
    assert f"{error.value}\n" in home_blocks("text")


@pytest.mark.parametrize("record", RECORDS, ids=["alpaca", "sharegpt", "messages", "query"])
def test_formats(record: str, place: Path) -> None:
    """The answer of each format is trained on, and its question is not."""
    Path("one.jsonl").write_text(record)
    options = Options(train_file="one.jsonl", data_cache_dir="cache", block_size=512, validation_split_percentage=0)
    sequence = prepare_data(options, AutoTokenizer.from_pretrained("Qwen3-0.6B")).train[0]
    trained_on = AutoTokenizer.from_pretrained("Qwen3-0.6B").decode(sequence.tokens[sequence.trained_on])
    assert trained_on.endswith("The weather is nice.<eos>")
    assert "今天" not in trained_on


def test_downloads_are_what_the_run_reads() -> None:
    """The directories of the downloads, and the mirror that huggingface_hub then asks."""
    (modelscope, hub) = home_blocks("sh")
    assert re.findall(r"--local_dir (\S+)", modelscope) == ["./Qwen3-0.6B", "./my-data"]
    (command,) = (line for line in TRAINING if "./my-data" in line)
    assert "--model_name_or_path ./Qwen3-0.6B --train_file ./my-data" in command
    mirror, download = hub.splitlines()
    code = "from huggingface_hub import hf_hub_url; print(hf_hub_url('Qwen/Qwen3-0.6B', 'config.json'))"
    shell = f'{mirror}; "{sys.executable}" -c "{code}"; "{Path(sys.executable).parent}/hf" download --help'
    printed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"{mirror.split('=')[1]}/Qwen/Qwen3-0.6B/")
    assert download.startswith("hf download Qwen/Qwen3-0.6B --local-dir ")
    assert "--local-dir" in printed


FORECASTS = re.findall(r"^\| (Qwen3-\S+) \|[^|]*\| `([^`]*)` \| ([\d.]+) GiB(.*) \|$", HOME.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "words", "memory", "more"),
    [pytest.param(*row, id=row[0], marks=[] if row[0] == "Qwen3-1.7B" else [pytest.mark.slow]) for row in FORECASTS],
)
def test_two_cards_of_24_gb(name: str, words: str, memory: str, more: str, model_dir: Path, tmp_path: Path) -> None:
    """The forecast for the shape of each model: the memory of the table, which fits."""
    hidden, intermediate, layers, heads, tied = SHAPES[name]
    Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path)
    common = f"--model_name_or_path {tmp_path} --train_file text.jsonl --block_size 2048 --global_batch_size 16"
    # As on a GPU: bf16, and compiled. The check would require a compiler here, and the prediction does not.
    options = parse([*common.split(), *words.split()], 2, bf16=True, torch_compile=True)
    plan = dataclasses.replace(options, torch_compile=False)
    check(plan, 2)
    options = dataclasses.replace(plan, torch_compile=True)
    model = build_model(options, load_config_and_tokenizer(options)[0])
    predicted, host = predict(model, options, 2), host_memory(model, options, 2)
    assert gib(predicted.total) == memory
    assert predicted.fits(24 * 2**30)
    assert (f"{gib(host)} GiB" in more) == bool(host)


def test_home_agrees_with_readme() -> None:
    """The stages of README.md in its order, its figures, and only options that exist."""
    home, readme = HOME.read_text(), (ROOT / "README.md").read_text()
    sections = {title: body for title, _, body in (part.partition("\n") for part in home.split("\n## ")[1:])}
    rows = re.findall(r"^\| [^|]+ \|([^|]*)\| [^|]+ \|$", sections["放不下时选哪种并行"], re.MULTILINE)[1:]
    assert rows == [options for _, options in re.findall(STAGES, readme, re.MULTILINE)]
    assert len(rows) > 10
    figures, known = (
        re.findall(r"\d[\d,.e-]*\d", re.sub(r"\]\(.*?\)", "", text)) for text in (sections["结果可信吗"], readme)
    )
    assert len(figures) > 10
    assert set(figures) - set(known) == set()
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", prose(HOME)))
    assert len(named) > 20
    assert named - set(vars(Options())) == OF_OTHERS


def test_languages_link_each_other() -> None:
    """The first screen of README.md links the Chinese one, which links all Chinese pages."""
    assert "(README.zh-CN.md)" in (ROOT / "README.md").read_text()[:500]
    home = HOME.read_text()
    assert "(README.md)" in home[:500]
    for page in ENGLISH:
        assert f"({page.relative_to(ROOT)})" in home, page
