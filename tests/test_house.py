"""The house: which room may import which, how large a room is, and the words that code and documents do not use."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT

# From the top: a room imports rooms of lower floors only.
FLOORS = [
    {"train", "compare", "examples"},
    {"estimate"},
    {"loss"},
    {"data"},
    {"chat", "checkpoint", "optim", "metrics"},
    {"model", "fsdp"},
    {"parallel"},
    {"ddp", "runtime"},
    {"config"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 12  # of a room

# Each pattern is a word or a phrase of the private dialect that the project once had, or of stilted English.
BANNED = [
    r"whoever",
    r"in vain",
    r"in the place of",
    r"told apart",
    r"gone on with",
    r"goes on with",
    r"let go of",
    r"alike",
    r"foreseen?",
    r"foresees",
    r"outlook",
    r"nobody waits",
    r"hand(s|ed)? over",
    r"ranks? a row",
    r"wider layer",
    r"projection back",
    r"entries of a head",
    r"training rows",
    r"divide[sd]? each (row|layer)",
    r"rows? (is|are) divided",
    r"divided (rows?|layers?)",
    r"ranks that divide",
    r"(two|several|many|all|other|more) hosts",
    r"(learned|given) (token|text|tokens|texts)",
    r"micro-steps exchanged",
    r"exchanged? (of )?(all )?gradients",
    r"gradients (are|is) exchanged",
]
STILTED = [r"What is", r"Of an?", r"One that", r"Those of", r"That of"]  # at the start of a sentence


def files(*suffixes: str) -> list[Path]:
    """The files of the project that git tracks, or would, with one of the suffixes."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in suffixes and path.exists()]


def room_of(path: Path) -> str:
    """The folder at the top that holds a file; a file at the top is a room by itself."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in FLOOR}


CODE = [path for path in files(".py") if room_of(path) != "tests"]


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in CODE} == FLOOR.keys()


def test_imports_go_down() -> None:
    """A room imports only rooms below it, so no two folders can need each other."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in CODE
        for name in imports(path)
        if (other := name.split(".")[0]) != room_of(path) and FLOOR[other] <= FLOOR[room_of(path)]
    ]
    assert wrong == []


def test_no_files_import_each_other() -> None:
    """Within a room too, imports have no circle: the files can be read in an order."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CODE if path.stem != "__init__"}
    needs = {name: imports(path) & modules.keys() for name, path in modules.items()}
    while ready := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in ready:
            del needs[name]
    assert needs == {}, "these files import each other in a circle"


def test_rooms_say_what_they_hold() -> None:
    for room in FLOOR.keys() - {"train"}:
        docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert docstring, f"{room}/__init__.py says nothing"
        assert len(docstring.splitlines()) >= 3, f"{room}/__init__.py: what lives there, and what may not?"
        assert len(list((ROOT / room).glob("[a-z]*.py"))) <= MOST_FILES


def sentences(path: Path) -> list[tuple[int, str]]:
    """The lines of a file with their numbers; the list of banned words itself is left out."""
    return list(enumerate(path.read_text().splitlines(), 1)) if path != Path(__file__).resolve() else []


@pytest.mark.parametrize("pattern", BANNED)
def test_words_of_the_field(pattern: str) -> None:
    """Code, comments, messages and documents use the standard word."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(".py", ".md", ".toml", ".yml", ".yaml")
        for number, line in sentences(path)
        if re.search(rf"\b({pattern})\b", line, re.IGNORECASE)
    ]
    assert found == []


@pytest.mark.parametrize("pattern", STILTED)
def test_sentences_begin_with_their_subject(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(".py", ".md")
        for number, line in sentences(path)
        if re.search(rf'(^|[.:] |# |""")\s*{pattern}\b', line) and not re.search(rf"{pattern}[^.]*\?", line)
    ]
    assert found == []
