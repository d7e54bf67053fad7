"""Plant a bug in a copy of the tree, and run our tests or the trainer there, in this process and in its ranks."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.launch import PROJECT, ROOT
from tests.museum.bugs import Bug


def plant(bug: Bug, directory: Path) -> Path:
    """The tree with the bug in it, at `directory`/NAME. Each right text must stand in its file exactly once."""
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
        (tree / change.file).write_text(source.replace(change.right, change.wrong))
    return tree


@contextlib.contextmanager
def working_in(tree: Path) -> Iterator[None]:
    """Import our modules from `tree`, in this process and in the ranks that it starts."""
    forkserver.ensure_running()  # with the modules of the right tree, which need not be imported again in later tests
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PROJECT}
    path, hooks, directory, environment = sys.path[:], sys.meta_path[:], Path.cwd(), dict(os.environ)
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    os.chdir(tree)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
            del sys.modules[name]
        sys.modules.update(ours)
        sys.path[:], sys.meta_path[:] = path, hooks
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)


class Reports:
    """A plugin for pytest that keeps what became of each test."""

    def __init__(self) -> None:
        self.calls: list[pytest.TestReport] = []
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.calls.append(report)
        elif report.failed:
            self.others.append(str(report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.others.append(str(report.longrepr))


def run_test(tree: Path, test: str, reference: Path | None = None) -> Reports:
    """Run one test of the planted tree, with the reference runs of the right tree or with its own."""
    reports = Reports()
    quiet = ["-p", "no:terminal", "-p", "no:timeout", "-p", "no:cacheprovider", "-o", "addopts="]
    with working_in(tree):
        if reference:
            os.environ["RIGHT_REFERENCE"] = str(reference)
        pytest.main([test, *quiet, f"--rootdir={tree}", f"--basetemp={tree}-temporary"], plugins=[reports])
    return reports
