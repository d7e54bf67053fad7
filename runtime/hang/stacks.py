"""Where the threads of this process are, and whether a process of this node runs. It reads; it changes nothing."""

import contextlib
import linecache
import os
import re
import socket
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = "torch/distributed/distributed_c10d.py"
# Calls in which the CPU waits for the GPU, and so perhaps for a collective of NCCL.
SYNCHRONIZES = re.compile(r"\.(item|tolist|cpu)\(|synchronize\(")
GPU = "the GPU"
LIBRARY = sysconfig.get_path("stdlib") + os.sep
STATES = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "Z": "has ended", "X": "has ended"}
STATES["D"] = "waits for a disk or a driver (state D)"


class Place(NamedTuple):
    """Where a thread is."""

    where: str  # the innermost line of this project: "train.py:151 (main)"
    collective: str  # what it waits for, if that needs other ranks: "all_reduce", "backward", "the GPU"; or ""
    debugged: bool  # whether a debugger has stopped there
    in_library: bool  # whether the innermost call is in Python's own library, as one that waits for a thread is


Calls = list[tuple[CodeType, int]]  # code and line, the innermost call last


def place_of_main() -> tuple[Place, tuple[int, int]]:
    """Where the main thread is, and a key that changes when it moves. Costs microseconds."""
    frames = _frames()
    main = frames.pop(threading.main_thread().ident or 0)
    calls = _calls_of_frame(main)
    key = id(main), main.f_lasti
    place = place_of(calls)
    # The saver's thread, or autograd's, may be the one that is in the collective.
    if any(code.co_name in ("_engine_run_backward", "result") for code, _ in calls):
        others = (place_of(_calls_of_frame(frame)).collective for frame in frames.values())
        place = place._replace(collective=next(filter(None, others), place.collective))
    return place, key


def place_of_error(error: BaseException) -> Place:
    """Where `error` was raised."""
    calls: Calls = []
    trace: TracebackType | None = error.__traceback__
    while trace:
        calls.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return place_of(calls)


def place_of(calls: Calls) -> Place:
    """The place that a stack of calls means."""
    if not calls:
        return Place("", "", False, False)
    project = f"{ROOT}{os.sep}"  # without .venv, which may be in it
    inside = [call for call in calls if call[0].co_filename.startswith(project)]
    ours = [call for call in inside if not call[0].co_filename.startswith(f"{project}.")] or calls
    code, line = ours[-1]
    path = os.path.relpath(code.co_filename, ROOT) if ours is not calls else Path(code.co_filename).name
    where = f"{path}:{line} ({code.co_name})"
    collectives = (code.co_name for code, _ in calls if code.co_filename.endswith(COLLECTIVES))
    collective = next(collectives, "")
    if not collective and calls[-1][0].co_name == "_engine_run_backward":
        collective = "backward"
    # A call into C++ has no frame of its own, so the last line is the call.
    if not collective and calls[-1] == (code, line) and SYNCHRONIZES.search(linecache.getline(code.co_filename, line)):
        collective = GPU
    modules = {Path(code.co_filename).name for code, _ in calls}
    file = calls[-1][0].co_filename
    in_library = file.startswith((LIBRARY, "<frozen ")) and "-packages" not in file
    return Place(where, collective, bool({"pdb.py", "bdb.py", "pydevd.py"} & modules), in_library)


def _calls_of_frame(frame: FrameType) -> Calls:
    return [(frame.f_code, line or 0) for frame, line in traceback.walk_stack(frame)][::-1]


def stacks() -> str:
    """The Python stacks of all threads of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(_frames().items(), key=lambda item: item[0] != main)
    shown = {ident: "".join(traceback.format_stack(frame)) for ident, frame in frames}
    own = {threading.get_ident(): "".join(traceback.format_stack())}
    shown = shown | own if threading.get_ident() != main else own | shown
    return "\n".join(f"thread {names.get(ident, ident)}\n{stack}" for ident, stack in shown.items())


def _frames() -> dict[int, FrameType]:
    """The innermost frame of each other thread.

    A frame that is held holds the tensors of its variables. A variable with the frame of its own function would be a
    cycle, so all frames would stay until the next collection of garbage.
    """
    frames = sys._current_frames()
    del frames[threading.get_ident()]
    return frames


def process_state(pid: int, started: int) -> str:
    """Why a process of this node does not run, if it `started` at so many clock ticks; "" if it runs or is unknown."""
    if not Path("/proc/self/stat").exists():
        return ""
    state, began, _ = _stat(pid)
    return STATES["Z"] if began != started else STATES.get(state, "")


def started(pid: int) -> int:
    """When a process of this node started, in clock ticks since the node did; 0 if it is unknown."""
    return _stat(pid)[1]


def stuck_children(states: str = "TtD") -> dict[int, str]:
    """The child processes of this one in one of these states, stopped or waiting for a disk, and what is wrong."""
    found = {pid: _stat(pid) for pid in _children()}
    return {
        pid: f"its process {pid} ({name}) {STATES[state]}" for pid, (state, _, name) in found.items() if state in states
    }


def _children() -> Iterator[int]:
    for tasks in Path("/proc/self/task").glob("*/children"):
        try:
            yield from map(int, tasks.read_text().split())
        except OSError:
            continue


def _stat(pid: int) -> tuple[str, int, str]:
    """The state letter of a process, its start and its name (proc(5)); ("X", 0, "") if there is none."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return "X", 0, ""
    fields = tail.split()
    return fields[0], int(fields[19]), head.partition("(")[2]


def machine() -> str:
    """Names the machine and the container of this process: equal for processes that can see each other."""
    found = []
    with contextlib.suppress(OSError):
        found = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(found) or socket.gethostname()
