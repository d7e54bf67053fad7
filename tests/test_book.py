"""Each chapter of docs/book/: its code is the code of the files that it names, its commands print what it shows, its
exercise fails as it says, and no part is missing.

A ```text block shows the output of the ```bash block before it. In it, a line `...` is any number of lines.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.launch import ROOT, run_instead, train
from tests.museum.bugs import BUGS
from tests.test_house import files
from tests.test_readme import anchors

BOOK = ROOT / "docs" / "book"
CHAPTERS = [pytest.param(path, id=path.stem) for path in sorted(BOOK.glob("[1-8]-*.md"))]
# Speeds, times and the memory of a process differ between runs. Libraries of other trainers log with a date.
MASKED = re.compile(
    r"[\d,]+ tokens/s, \d+:\d\d:\d\d left|^\[\d{4}-\d\d-\d\d .*\n|^  [a-z ]+ [\d,]+\.\d\d\n"
    r'|(?<="tokens_per_second": )[\d.]+|(?<="peak_memory_gib": )[\d.]+|(?<="data_wait_seconds": )[\d.e-]+',
    re.MULTILINE,
)
EXERCISE = "\n## Exercise\n"
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[str, str]]:
    """Each block of commands, and the output that follows it."""
    return re.findall(r"^```bash\n(.*?)^```\n\n```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def steps(text: str) -> list[tuple[str, str, str]]:
    """In their order, each diff, and each block of commands with the output that follows it."""
    return re.findall(r"^```(?:diff\n(.*?)|bash\n(.*?)^```\n\n```text\n(.*?))^```$", text, re.DOTALL | re.MULTILINE)


def statements(text: str) -> list[str]:
    """The lines of code without indentation, empty lines and lines of comments."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def check_shown(shown: str, printed: str, command: str) -> None:
    """The whole output is what is shown."""
    pattern = re.escape(MASKED.sub("", shown)).replace(r"\.\.\." + "\\\n", r"(?:.*\n)*?")
    assert re.fullmatch(pattern, MASKED.sub("", printed)), f"{command}shown:\n{shown}\nprinted:\n{printed}"


@each_chapter
def test_has_all_parts(chapter: Path) -> None:
    """The question, the drawing, the code, a prediction, a run, an exercise with its solution, and practice."""
    text = chapter.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Question"
    assert headings[-2:] == ["Exercise", "What goes wrong in practice"]
    assert {"The code", "Predict first", "Run"} <= set(headings)
    assert headings.index("Predict first") < headings.index("Run")
    assert blocks(text, "mermaid") or "](drawings/" in text
    assert blocks(text, "python")
    assert len(commands(text)) == len(blocks(text, "bash")) > 1, "each command shows its output"
    before, exercise = text.split(EXERCISE)
    exercise, practice = exercise.split("\n## What goes wrong in practice\n")
    assert before.count("<details>") >= 3, "questions with folded answers"
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>")
    (solution,) = re.findall(r"<details>(.*)</details>", exercise, re.DOTALL)
    assert blocks(solution, "diff")
    assert commands(solution)
    assert 1500 < len(re.findall(r"\w+", text)) < 5000, "10 to 20 minutes"
    issues = re.findall(r"https://github.com/([^/]+/[^/]+)/(?:issues|pull)/(\d+)", practice)
    assert len(issues) >= 3
    assert {"#".join(issue) for issue in issues} <= {bug.source for bug in BUGS}, "sources that the museum has"


@each_chapter
def test_code_is_that_of_the_file(chapter: Path) -> None:
    """Each block of Python names its file, which has these lines, one after another, once."""
    text = chapter.read_text()
    named = re.findall(r"^<!-- from ([\w/.]+) -->\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(named) == len(blocks(text, "python")), "a block without <!-- from FILE -->"
    for name, block in named:
        code, shown = statements((ROOT / name).read_text()), statements(block)
        found = [start for start in range(len(code)) if code[start : start + len(shown)] == shown]
        assert len(found) == 1, f"{len(found)} times in {name}:\n{block}"


@each_chapter
def test_bugs_can_be_planted(chapter: Path) -> None:
    """The diffs apply to the tree as it is, one after another."""
    changes = "".join(blocks(chapter.read_text(), "diff"))
    check = subprocess.run(["git", "apply", "--check", "-"], cwd=ROOT, input=changes, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("page", sorted(BOOK.glob("*.md")), ids=lambda path: path.stem)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not target.startswith("https://"):
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_contents() -> None:
    """README.md of the book has eight chapters in order, and links those that exist."""
    rows = re.findall(
        r"^\| (\d) \| (?:\[[^]]+\]\(([^)]+)\)|[^|\[]+) \|", (BOOK / "README.md").read_text(), re.MULTILINE
    )
    assert [number for number, _ in rows] == list("12345678")
    linked = [(int(path.name[0]), path.name) for path in sorted(BOOK.glob("[1-8]-*.md"))]
    assert [(int(number), name) for number, name in rows if name] == linked


def run_quickly(command: str, place: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What one command prints: train.py and torchrun on forked ranks, modules in this process, others in a shell."""
    words = shlex.split(command.removesuffix(" | cat"))  # which stands for no terminal, and tests have none
    launched = words[0] == "torchrun"
    if launched or words[:2] == ["python", "train.py"]:
        ranks = int(words[1].removeprefix("--nproc_per_node=")) if launched else 1
        program, *argv = words[launched + 1 :]
        before = partial(run_instead, *argv) if program == "-m" else partial(os.chdir, place)
        outcome = train(ranks, argv, before)
        assert outcome.exit_codes == [0] * ranks, outcome.output
        return outcome.output
    if words[:2] == ["python", "-m"]:
        capfd.readouterr()
        importlib.import_module(words[2]).main(words[3:])
        return capfd.readouterr().out
    return in_shell(command, place).stdout


def in_shell(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("chapter", CHAPTERS[:3])
def test_commands(
    chapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The commands before the exercise, in their order. The slow test has the other chapters."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    for command, shown in commands(chapter.read_text().split(EXERCISE)[0]):
        lines = command.replace("\\\n", " ").splitlines()
        check_shown(shown, "".join(run_quickly(line, tmp_path, capfd) for line in lines), command)


@pytest.mark.slow
@each_chapter
def test_as_a_reader_types(chapter: Path, tmp_path: Path) -> None:
    """All diffs and commands, in their order, in a copy of the tree, by the shell."""
    for path in files(".py", ".yaml", ".json", ""):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for change, command, shown in steps(chapter.read_text()):
        if change:
            subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=change, text=True, check=True)
            continue
        run = in_shell(command, tmp_path)
        assert "Traceback" not in run.stderr, run.stderr
        check_shown(shown, run.stdout, command)
