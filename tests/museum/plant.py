"""Plant a bug in a copy of the tree, and run our tests or the trainer there, in a process of its own and its ranks."""

import ast
import importlib
import os
import shutil
import sys
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.launch import PROCESSES, PROJECT, ROOT
from tests.museum.bugs import Bug


def plant(bug: Bug, directory: Path) -> Path:
    """The tree with the bug in it, at `directory`/NAME. Each right text must stand in its file exactly once.

    Raises SyntaxError for a bug that Python cannot read: a test of a whole run would fail without having seen the bug.
    """
    tree = directory / bug.name.replace(" ", "_")
    tree.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name in PROJECT:
            shutil.copytree(path, tree / path.name)  # with __pycache__: only the changed files are compiled again
        elif path.suffix in (".py", ".toml") or path.name == "LICENSE":
            shutil.copy(path, tree)
    for change in bug.changes:
        source = (tree / change.file).read_text()
        assert source.count(change.right) == 1, f"{bug.name}: {change.file} must hold this once: {change.right}"
        planted = source.replace(change.right, change.wrong)
        ast.parse(planted)
        (tree / change.file).write_text(planted)
    return tree


def call(tree: Path, function: str, *arguments: Any) -> Any:
    """What `function` (module:name) of the modules of `tree` returns. Raises EOFError if the call fails.

    A process of its own imports these modules. torch keeps the operators of model/experts.py by their names: a second
    import in this process would free the first ones, which other tests still call. (They then end with std::bad_alloc.)
    """
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_go_and_call, args=(tree, theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
        process.join()
        return answer
    finally:
        process.kill()


def _go_and_call(tree: Path, answer: Connection, function: str, arguments: tuple[Any, ...]) -> None:
    # Python would start a second server here, and import all libraries again. The server of this process is used.
    forkserver.ForkServer.ensure_running = lambda self: None  # type: ignore[method-assign]
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    os.chdir(tree)
    module, name = function.split(":")
    answer.send(getattr(importlib.import_module(module), name)(*arguments))


@dataclass(eq=False)  # pytest needs its plugins hashable
class Reports:
    """A plugin for pytest that keeps what became of each test: its outcome, and the words of its failure."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.calls.append((report.outcome, str(report.longrepr)))
        elif report.failed:
            self.others.append(str(report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.others.append(str(report.longrepr))


def run_test(tree: Path, test: str, reference: Path | None = None) -> Reports:
    """Run one test of the planted tree, with the reference runs of the right tree or with its own."""
    reports: Reports = call(tree, "tests.museum.plant:run_test_here", tree, test, reference)
    return reports


def run_test_here(tree: Path, test: str, reference: Path | None) -> Reports:
    """The same, in a process that works in `tree`."""
    if reference:
        os.environ["RIGHT_REFERENCE"] = str(reference)
    reports = Reports()
    quiet = ["-p", "no:terminal", "-p", "no:timeout", "-p", "no:cacheprovider", "-o", "addopts="]
    pytest.main([test, *quiet, f"--rootdir={tree}", f"--basetemp={tree}-temporary"], plugins=[reports])
    return reports
