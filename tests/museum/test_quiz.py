"""The quiz plants every bug of the museum without naming it, and answers with a diff that undoes it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import OptionError
from tests.launch import ROOT
from tests.museum import quiz
from tests.museum.bugs import BUGS, CHAPTERS, Bug, Curve
from tests.museum.test_museum import name


@pytest.fixture
def without_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect of a bug is a line, so that no test waits for its runs."""
    monkeypatch.setattr(quiz, "show_effect", lambda bug, tree, directory: "the effect")


def added_lines(bug: Bug) -> list[str]:
    """The lines that the answer shows as planted or removed, without those of the context."""
    return [line[1:].strip() for line in quiz.answer(bug).splitlines() if re.match(r"[+-](?![+-])", line)]


@pytest.mark.parametrize("bug", BUGS, ids=name)
def test_every_bug(
    bug: Bug, without_runs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is planted, the copy does not tell which it is, and the diff of the answer gives the right tree back."""
    quiz.ask(bug, tmp_path)
    tree, printed = tmp_path / "tree", capsys.readouterr().out
    assert "the effect" in printed
    assert bug.name not in printed + (tmp_path / "state.json").read_text()
    assert not list(tree.rglob(".git")) + list(tree.rglob("__pycache__")) + list(tree.rglob("museum"))
    assert {path.stat().st_mtime for path in tree.rglob("*")} == {0}
    assert quiz.planted_bug(tmp_path) is bug

    changed = {change.file for change in bug.changes}
    differ = [path for path in tree.rglob("*.py") if path.read_bytes() != (ROOT / path.relative_to(tree)).read_bytes()]
    assert {str(path.relative_to(tree)) for path in differ} == changed
    answer = quiz.answer(bug)
    assert bug.story in answer
    assert bug.killer in answer
    diff = answer[answer.index("--- a/") : answer.index("\nThis test fails")]
    command = ["git", "apply", "--reverse", "--unidiff-zero", "-"]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(command, cwd=tree, input=diff, text=True, check=True, env=environment)
    assert all((tree / file).read_bytes() == (ROOT / file).read_bytes() for file in changed)


@pytest.mark.parametrize("bug", BUGS, ids=name)
def test_hints_help_and_do_not_tell(bug: Bug) -> None:
    room, function, symptom = (quiz.hint(bug, number) for number in (1, 2, 3))
    assert bug.group in room
    assert bug.changes[0].file.split("/")[0] in room
    assert bug.changes[0].file in function
    assert re.search(r"\w\(\)|outside of all functions", function)
    assert symptom == bug.symptom
    for words in (room, function, symptom):
        assert bug.name.lower() not in words.lower()
        assert not any(line in words for line in added_lines(bug) if line)


def test_chapter_and_seed_choose() -> None:
    for chapter in CHAPTERS:
        chosen = {quiz.choose(chapter, seed).name for seed in range(300)}
        assert chosen == {bug.name for bug in BUGS if bug.chapter == chapter}
    assert {quiz.choose(None, seed).chapter for seed in range(300)} == CHAPTERS.keys()
    assert quiz.choose(None, 7) is quiz.choose(None, 7)


def test_a_quiz_is_planted_again_by_its_last_line(
    without_runs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without SEED, the seed is drawn and printed. A second quiz takes the place of the first."""
    quiz.main(["--chapter", "5"], tmp_path)
    chapter, seed = re.findall(r"make quiz CHAPTER=(5) SEED=(\d+)", capsys.readouterr().out)[0]
    planted = (tmp_path / "state.json").read_text()
    quiz.ask(next(bug for bug in BUGS if digest_of(planted) != quiz.digest(bug)), tmp_path)
    assert (tmp_path / "state.json").read_text() != planted
    quiz.main(["--chapter", chapter, "--seed", seed], tmp_path)
    assert (tmp_path / "state.json").read_text() == planted
    assert quiz.planted_bug(tmp_path).chapter == 5


def digest_of(state: str) -> str:
    return str(json.loads(state)["bug"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--chapter", "9"], "CHAPTER=9: no such value\nPass a whole number from 1 to 8."),
        (["--chapter", "two"], "CHAPTER=two: no such value"),
        (["--seed", "-1"], "SEED=-1: no such value"),
        (["--hint", "1"], "state.json: no planted bug\nRun `make quiz` first."),
        (["--answer", "1"], "state.json: no planted bug"),
        (["--hint", "1", "--chapter", "3"], "CHAPTER=3 HINT=1: HINT and ANSWER speak of the planted bug"),
        (["--hint", "1", "--answer", "1"], "HINT=1 ANSWER=1: HINT and ANSWER speak of the planted bug"),
    ],
)
def test_wrong_values_are_refused(argv: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        quiz.main(argv, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"), [("--hint", "4"), ("--hint", "0"), ("--answer", "0"), ("--answer", "yes")]
)
def test_wrong_hints_and_answers_are_refused(option: str, value: str, without_runs: None, tmp_path: Path) -> None:
    """ANSWER=0 must not give the answer away."""
    quiz.ask(BUGS[0], tmp_path)
    with pytest.raises(OptionError, match=f"{option[2:].upper()}={value}: no such value"):
        quiz.main([option, value], tmp_path)


def test_the_command_ends_with_exit_code_2() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.museum.quiz", "--chapter", "9"], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith("quiz: error: CHAPTER=9: no such value\nPass a whole number from 1 to 8.\n")
    assert "Traceback" not in ended.stderr


def test_the_table() -> None:
    """Each step has both values and both marks in their columns. A value that is missing, as NaN is, is said."""
    right, wrong = [(1, 4.0), (2, 3.0), (3, 2.0)], [(1, 4.0), (2, 3.5)]
    head, first, second, third = quiz.table("loss", right, wrong).splitlines()
    assert head.split() == ["step", "right", "o", "bug", "x", "x", "-", "o", "2", "4", "loss"]
    assert first.split() == ["1", "4", "4", "+0", "*"]
    assert second.split() == ["2", "3", "3.5", "+0.5", "o", "x"]
    assert third.split() == ["3", "2", "none", "o"]
    columns = [third.rindex("o"), second.rindex("o"), second.index("x"), first.index("*")]
    assert [column - head.index("2 ") for column in columns] == [0, 20, 30, 40]
    rows = quiz.table("loss", [(step, 1.0) for step in range(1, 41)], []).splitlines()
    assert len(rows) == 1 + quiz.ROWS


def test_the_run_is_described() -> None:
    described = quiz.describe(Curve(2, ("--bf16", "true"), resume_at=20, value="learning_rate"))
    assert described == "learning rate on 2 ranks, --bf16 true, resumed from a checkpoint at step 20"


@pytest.mark.slow
@pytest.mark.parametrize("curve", [True, False], ids=["a curve", "a test"])
def test_a_whole_quiz(curve: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two values of the last step differ, or a test fails; then come the hints and the answer."""
    seed = next(seed for seed in range(300) if bool(quiz.choose(2, seed).curve) == curve)
    quiz.main(["--chapter", "2", "--seed", str(seed)], tmp_path)
    printed, bug = capsys.readouterr().out, quiz.choose(2, seed)
    if curve:
        step, right, wrong, *_ = re.findall(r"^ +\d+ .*", printed, re.MULTILINE)[-1].split()
        assert int(step) >= 30
        assert right != wrong
    else:
        assert re.search(r"^> .*\n(E .*)", printed, re.MULTILINE)
    assert bug.name not in printed
    for number in ("1", "2", "3"):
        quiz.main(["--hint", number], tmp_path)
        assert capsys.readouterr().out.strip() == quiz.hint(bug, int(number))
    quiz.main(["--answer", "1"], tmp_path)
    assert capsys.readouterr().out.lower().startswith(bug.name.lower())
