"""Processes that end with the process that started them, also if it is killed and cannot end them."""

import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

INTERVAL = 0.5  # seconds between two looks at torchrun
PROCESSES = Path("/proc")


def follow_launcher() -> None:
    """End this rank as soon as the torchrun that started it has ended. A thread watches it, on Linux only.

    torchrun starts its ranks in sessions of their own. If it is killed, they would train on and keep output_dir locked.
    Ranks of other launchers are left alone. srun and mpirun have daemons that end them, and a process that was started
    by hand may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not (PROCESSES / "self/maps").exists():
        return
    launcher = find_launcher()
    if launcher is not None:
        threading.Thread(target=_follow, args=(launcher, _born(launcher)), daemon=True).start()


def find_launcher() -> int | None:
    """The process of torchrun that started this rank: the nearest ancestor that has loaded torch.

    A shell may be between. 0 if torchrun has ended already, because an orphan's parent is init or another reaper, which
    has not loaded torch. None if it is not known.
    """
    process = os.getppid()
    while process > 1:
        try:
            if "libtorch" in (PROCESSES / str(process) / "maps").read_text(errors="replace"):
                return process
            process = int(_fields(process)[1])
        except FileNotFoundError:  # it has ended meanwhile
            process = os.getppid()
        except OSError:  # of another user
            return None
    with suppress(OSError):  # in a container, torchrun may be the first process
        if process == 1 and "libtorch" in (PROCESSES / "1/maps").read_text(errors="replace"):
            return 1
    return 0 if process == 1 else None  # 0: an ancestor outside of this container


def follow_parent() -> None:
    """End this forked worker as soon as its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _follow(launcher: int, born: str) -> None:
    while born and _born(launcher) == born:
        time.sleep(INTERVAL)
    if os.environ.get("LOCAL_RANK") == "0":
        message = "train.py: error: torchrun has ended without its ranks, so they end; checkpoints are intact\n"
        with suppress(OSError):
            os.write(sys.stderr.fileno(), message.encode())
    os._exit(1)


def _born(process: int) -> str:
    """When a process started, in ticks of the kernel, so that another process with its number is not taken for it.

    "" if it has ended, although its parent has not yet asked for its exit code.
    """
    with suppress(OSError):
        state, *fields = _fields(process)
        return "" if state in "ZX" else fields[18]
    return ""


def _fields(process: int) -> list[str]:
    """The fields of /proc/PROCESS/stat that follow the name: state, parent, ..."""
    return (PROCESSES / str(process) / "stat").read_text().rpartition(")")[2].split()
