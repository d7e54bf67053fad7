"""The notebook of the book runs from its first cell to its last, and its stored outputs are those that it gives."""

import importlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT
from tests.test_readme import anchors

NOTEBOOK = ROOT / "docs" / "book" / "reading-a-run.ipynb"
MOST_BYTES = 200_000
Outputs = list[list[tuple[str, str]]]


def outputs(notebook: dict[str, Any]) -> Outputs:
    """Of each cell of code: the text that it printed, and the kinds of its pictures."""
    found: Outputs = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            found.append([])
            for output in cell["outputs"]:
                assert output["output_type"] in ("stream", "display_data"), output
                if output["output_type"] == "stream":
                    assert output["name"] == "stdout", output
                    found[-1].append(("text", "".join(output["text"])))
                else:
                    found[-1].append(("picture", "image/png" if "image/png" in output["data"] else ""))
    return found


def test_stored_outputs() -> None:
    """The file has the outputs of one run of all cells, is small, and names no folder of the machine that ran it."""
    text = NOTEBOOK.read_text()
    notebook = json.loads(text)
    assert len(text) < MOST_BYTES
    assert str(Path.home()) not in text
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run all cells, in their order, in a new kernel"
    pictures = [kind for cell in outputs(notebook) for name, kind in cell if name == "picture"]
    assert pictures == ["image/png"] * 4


def test_words_between_cells() -> None:
    """Each cell of code follows a text. The columns and the links of the texts exist."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        assert (NOTEBOOK.parent / name).exists(), target
        assert not anchor or anchor in anchors(NOTEBOOK.parent / name), target


@pytest.mark.slow
def test_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new kernel, in a folder where docs/ and train.py are those of the tree. Needs requirements-dev.txt."""
    nbclient = importlib.import_module("nbclient")
    nbformat = importlib.import_module("nbformat")
    for name in ("docs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no settings of the user
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    expected = outputs(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert outputs(notebook) == expected
    assert (tmp_path / "output-book" / "notebook" / "metrics.jsonl").exists()
