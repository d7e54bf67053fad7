"""Proves runtime/startup.py and runtime/workers.py: a process that lacks files, memory, threads or /dev/shm says so.

Each limit is set by a shell around train.py. An environment in which the run works is tested by training in it.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, train

SMALL_SHM = "mount -t tmpfs -o size=64k tmpfs /dev/shm"


def run(shell: str, argv: list[object], *around: str, **environment: str) -> tuple[int, str]:
    """The exit code and the output of train.py, started by a shell after the command `shell`."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may be relative
    words = [sys.executable, str(ROOT / "train.py"), *map(str, argv)]
    completed = subprocess.run(
        [*around, "bash", "-c", f'{shell}; exec "$@"', "bash", *words],
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=150,  # it hung
    )
    return completed.returncode, completed.stdout + completed.stderr


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        (
            "ulimit -v 2097152",
            "this process may have 2147483648 bytes of address space, but needs 4294967296 or more\n"
            "run ulimit -v unlimited, and limit the memory",
        ),
        (
            "ulimit -n 40",
            "this process may have 40 open files, but needs 64 or more\n"
            "run ulimit -n 4096, or raise the limit of the container",
        ),
        (
            "mkdir gone; cd gone; rmdir ../gone",
            "the current directory has been deleted\nchange to a directory that exists",
        ),
    ],
)
@pytest.mark.fault(
    "process",
    "2 GiB of address space, 40 open files, or a current directory that was deleted",
    "refused before torch is imported, with what to run; exit code 2",
)
def test_refused_at_once(tmp_path: Path, shell: str, message: str) -> None:
    argv: list[object] = ["--output_dir", tmp_path / "run"]
    assert run(f"cd {tmp_path}; {shell}", argv) == (2, f"train.py: error: {message}\n")


@pytest.mark.parametrize("module", [None, "runtime.doctor"])
@pytest.mark.parametrize(
    ("package", "error"),
    [("torch", "OSError"), ("torch", "ImportError"), ("datasets", "")],
    ids=["libraries", "versions", "absent"],
)
@pytest.mark.fault(
    "process",
    "a package that is not installed, or a torch whose libraries are absent or of another version",
    "refused with what to install; exit code 2; no traceback",
)
def test_packages(tmp_path: Path, module: str | None, package: str, error: str) -> None:
    """`runtime.doctor` says the same: it could see nothing without torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name: None if name == '{package}' and not '{error}' else find(name)\n"
    )
    if error:
        (tmp_path / f"{package}.py").write_text(f"raise {error}('libcudart.so.13: no such file')")
    words = ["-m", module] if module else [str(ROOT / "train.py")]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    first, remedy = done.stderr.splitlines()
    assert done.returncode == 2
    assert first == "train.py: error: " + (
        f"{package} cannot be loaded: libcudart.so.13: no such file"
        if error
        else f"{sys.executable} does not have {package}"
    )
    assert remedy.startswith("install the build for this machine: " if error else "run .venv/bin/python, ")


@pytest.mark.fault(
    "process", "a limit of 20 processes and threads", "refused with what was counted and what to raise; exit code 2"
)
def test_few_processes(tmp_path: Path) -> None:
    """The limit does not hold for root, so this process becomes another user, who may read all files."""
    user = ["setpriv", "--reuid=12345", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    if subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("needs root, to become another user")
    code, output = run("ulimit -u 20", ["--output_dir", tmp_path / "run"], *user)
    assert code == 2
    assert "threads, but needs" in output
    assert "raise the limit of processes (ulimit -u" in output
    assert len(output.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "around", "message"),
    [
        pytest.param(
            SMALL_SHM, ["unshare", "--mount"], "give /dev/shm or the memory more room", id="/dev/shm of 64 KiB"
        ),
        pytest.param(
            "mount -t tmpfs -o ro tmpfs /dev/shm",
            ["unshare", "--mount"],
            "make /dev/shm writable",
            id="/dev/shm read-only",
        ),
    ],
)
@pytest.mark.fault(
    "process",
    "/dev/shm of 64 KiB or read-only, with workers of the data loader",
    "a message with the remedies, one of them --dataloader_num_workers 0; exit code 2; no hang",
)
def test_workers_lack_something(
    tiny: list[object], tmp_path: Path, shell: str, around: list[str], message: str
) -> None:
    if around and subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip("needs root, to mount another /dev/shm")
    argv = [*tiny, "--output_dir", tmp_path, "--dataloader_num_workers", 2]
    code, output = run(shell, argv, *around)
    assert code == 2, output
    assert "Traceback" not in output
    assert "train.py: error: dataloader_num_workers 2: " in output
    assert output.endswith(f"{output[output.index(message) :]}")
    assert output.endswith("or pass --dataloader_num_workers 0\n")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


@pytest.mark.fault(
    "process",
    "64 open files, with workers of the data loader",
    "a message with the remedies: ulimit -n, or --dataloader_num_workers 0; exit code 2; no hang",
)
def test_workers_lack_files(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(1, [*tiny, "--output_dir", tmp_path, "--dataloader_num_workers", 2], before=limit_files)
    assert outcome.exit_codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert "train.py: error: dataloader_num_workers 2: Too many open files" in outcome.output
    assert outcome.output.endswith("ulimit -n 4096\nor pass --dataloader_num_workers 0\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "around", "environment"),
    [
        pytest.param(SMALL_SHM, ["unshare", "--mount"], {}, id="/dev/shm of 64 KiB without workers"),
        pytest.param("ulimit -n 64", [], {}, id="64 files without workers"),
        pytest.param(
            "unset HOME", [], {"TMPDIR": "/nonexistent", "TZ": "Mars/Phobos"}, id="no HOME, wrong TMPDIR and TZ"
        ),
        pytest.param(
            ":", [], {"HOME": "/proc", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, id="read-only HOME, ASCII"
        ),
        pytest.param("exec <&- >&- 2>&-", [], {}, id="closed streams"),
        pytest.param("exec > >(head -n 1 >/dev/null)", [], {}, id="a pipe whose reader has gone"),
        pytest.param("exec > /dev/full 2>&1", [], {}, id="the disk of the log is full"),
    ],
)
@pytest.mark.fault(
    "process",
    "no HOME, a wrong TMPDIR, an ASCII locale, closed standard streams, a reader of the output that has gone",
    "training works",
)
def test_works(tiny: list[object], tmp_path: Path, shell: str, around: list[str], environment: dict[str, str]) -> None:
    if around and subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip("needs root, to mount another /dev/shm")
    argv = [*tiny, "--output_dir", tmp_path / "Ausgabe-für-日本", "--max_steps", 3, "--run_name", "日本"]
    code, output = run(shell, argv, *around, **environment)
    assert code == 0, output
    assert (tmp_path / "Ausgabe-für-日本" / "model.safetensors").exists()
