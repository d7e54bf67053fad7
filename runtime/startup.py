"""What must be in place before torch is imported: standard streams, signals, and what the system allows the process.

train.py imports this room first, so importing this file starts all of it in the process of train.py. Other commands
only find out whether Python and the packages are right. torch, gloo and the tokenizer hang or abort where the system
refuses them memory, files or threads, so too low limits are refused here.
"""

import contextlib
import faulthandler
import importlib
import importlib.util
import io
import os
import resource
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NoReturn

ADDRESS_SPACE = 4 * 2**30  # bytes; torch on a CPU takes 2 to 3 GiB, and each of its threads has an arena and a stack
OPEN_FILES = 64
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "tqdm")  # requirements.txt
THREADS = 32  # and those of the tokenizer (one for each core) and of torch (OMP_NUM_THREADS)


def start_process() -> None:
    """Open closed streams, answer signals, and raise the limits of this process. Exits with 2 if they are too low."""
    from runtime.signals import answer_signals  # only here: an old Python could not read it

    _open_streams()
    faulthandler.enable()  # a bus error, as when the disk of a mapped file fails, prints the Python stack
    answer_signals()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for number, least, what, remedy in (
        (resource.RLIMIT_AS, ADDRESS_SPACE, "bytes of address space", "run ulimit -v unlimited, and limit the memory"),
        (resource.RLIMIT_NOFILE, OPEN_FILES, "open files", "run ulimit -n 4096, or raise the limit of the container"),
    ):
        allowed, _ = resource.getrlimit(number)
        if allowed != resource.RLIM_INFINITY and allowed < least:
            _refuse(f"this process may have {allowed} {what}, but needs {least} or more\n{remedy}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    _require_threads(THREADS + cores + (int(threads) if threads.isdecimal() else cores))
    if any("\udc80" <= character <= "\udcff" for word in sys.argv for character in word):
        _refuse("a word of the command is not valid text in the encoding of the locale\nset LC_ALL to C.UTF-8")
    try:
        Path.cwd()
    except OSError:
        _refuse("the current directory has been deleted\nchange to a directory that exists")
    try:
        tempfile.gettempdir()
    except OSError as error:
        _refuse(f"no directory for temporary files: {error.strerror}\nset TMPDIR to a directory that can be written")


class _Output(io.FileIO):
    """The standard output or error. Training continues when its reader has gone or the disk of the log is full."""

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        try:
            written = super().write(data)  # type: ignore[arg-type]
        except OSError:
            return size
        return size if written is None else written


def _open_streams() -> None:
    """Make writing to the standard streams safe. A closed one is /dev/null: a file of the run would get its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        safe = io.TextIOWrapper(
            io.BufferedWriter(_Output(number, "w", closefd=False)),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",  # a text that the locale cannot show
            line_buffering=number == 2 or os.isatty(number),
            write_through=bool(os.environ.get("PYTHONUNBUFFERED")),
        )
        setattr(sys, name, safe)


def _require_threads(count: int) -> None:
    """Start that many threads at once, to find out whether the system permits them, and end them."""
    end, started = threading.Event(), list[threading.Thread]()
    stack = threading.stack_size(2**16)
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        _refuse(
            f"this process could start {len(started)} threads, but needs {count}\n"
            "raise the limit of processes (ulimit -u, or the pids limit of the container), or end other processes"
        )
    finally:
        threading.stack_size(stack)
        end.set()
        for thread in started:
            thread.join()


def require_packages() -> None:
    """Import torch. Exits with 2 if a package is absent, or torch cannot be loaded."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        _refuse(
            f"{sys.executable} does not have {', '.join(missing)}\n"
            "run .venv/bin/python, for which make train installs them, or pip install -r requirements.txt"
        )
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # as when a library of CUDA is absent, or of another version
        _refuse(f"torch cannot be loaded: {error}\ninstall the build for this machine: pytorch.org/get-started/locally")


def _refuse(text: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: error: {text}", file=sys.stderr)
    os._exit(2)


warnings.filterwarnings("ignore", "CUDA initialization")  # torch says it in each rank, runtime/doctor/ once
if sys.version_info < (3, 11):  # noqa: UP036
    _refuse("Python " + sys.version.split()[0] + " is too old\nuse Python 3.11 or newer")
if Path(getattr(sys, "argv", [""])[0]).name == "train.py":
    start_process()
require_packages()
