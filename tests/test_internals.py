"""docs/internals.md lists every private interface of torch and transformers that the code touches."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT

PAGE = (ROOT / "docs" / "internals.md").read_text()
FILES = [path for path in ROOT.glob("[!.]*/**/*.py") if path.relative_to(ROOT).parts[0] not in {"tests", "output"}]
FILES += ROOT.glob("*.py")

# Interfaces without an underscore that the libraries do not document, or that are experimental.
UNDOCUMENTED = {
    *("find_packed_sequence_indices", "sdpa_flop_count", "get_model_conversion_mapping", "LoadStateDictInfo"),
    *("rename_source_key", "revert_weight_conversion", "dot_natural_key", "custom_object_save", "str_to_torch_dtype"),
    *("found_inf", "grad_scale", "experimental_event_tree", "HuggingFaceStorageWriter", "HuggingFaceStorageReader"),
    "load_balancing_loss_func",
    *("chunked_overlay", "no_init_weights"),
    *("varlen_attn", "compute_local_shape_and_global_offset", "WeightConverter", "WeightRenaming"),
}
PUBLIC = {"_replace", "_asdict", "_fields", "_exit", "_current_frames"}  # of Python, which documents them


def touched(tree: ast.AST) -> Iterator[str]:
    """The names of interfaces that a file touches and that are private, or in UNDOCUMENTED."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            names = [str(node.args[1].value)] if isinstance(node.args[1], ast.Constant) else []
        for name in names:
            private = name.startswith("_") and not name.startswith("__") and name not in own | PUBLIC
            if private or name in UNDOCUMENTED:
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_interfaces_are_listed(path: Path) -> None:
    """Each name is in docs/internals.md, in a line that links its file."""
    file = str(path.relative_to(ROOT))
    lines = [line for line in PAGE.splitlines() if f"(../{file})" in line]
    missing = {
        name
        for name in touched(ast.parse(path.read_text()))
        if not any(re.search(rf"\b{name}\b", line) for line in lines)
    }
    assert missing == set()


def test_listed_interfaces_are_touched() -> None:
    """Each file that a line of the table links contains a name of that line, so the page has no stale line."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) > 20
    for line in lines:
        names, files, *_ = line.strip("| ").split(" | ")
        for file in re.findall(r"\(\.\./([\w/]+\.py)\)", files):
            text = (ROOT / file).read_text()
            assert any(name.split(".")[-1] in text for name in re.findall(r"`([\w.]+)`", names)), line
