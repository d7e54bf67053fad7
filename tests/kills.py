"""Ways to kill a rank: at a counted line of our code, or from outside at a random moment of training."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from metrics.records import read_records
from tests.launch import ROOT, Ranks


def die_at_line(file: str, text: str, count: int, rank: int) -> None:
    """Let `rank` be killed (SIGKILL) when it is about to run a line of `file` that holds `text`: its `count`-th one.

    Lines are seen in the thread that calls, and in threads that it starts later: those of train.py are steps and
    evaluations, those of checkpoint.py in the saving thread are a save.
    """
    at_line(file, text, count, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def at_line(file: str, text: str, count: int, rank: int, act: Callable[[], None]) -> None:
    """Let `rank` call `act` before the `count`-th line with `text` that it runs in `file`, which may be a folder."""
    if os.environ["RANK"] != str(rank):
        return
    seen = 0
    files = (ROOT / file).glob("*.py") if (ROOT / file).is_dir() else [ROOT / file]
    lines = {
        (str(path), number)
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if text in line
    }
    paths = {path for path, _ in lines}
    assert lines, f"{file} has no line with {text}"

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in paths:
            return None
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) in lines:
            seen += 1
            if seen == count:
                act()
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def kill_at_random(draw: random.Random, output_dir: Path, steps: int, seconds: float, ranks: Ranks) -> None:
    """Kill one rank, or all at once, in a random step of a run of `steps` steps that take `seconds` together.

    The step is drawn, and not the time, so that the kill comes before the end on a busy machine, too.
    """
    victims = draw.choice([ranks, [draw.choice(ranks)]])
    step, delay = draw.randrange(steps), draw.uniform(0, seconds / steps)
    metrics = output_dir / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while ranks[0].is_alive() and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
        time.sleep(0.01)
    while ranks[0].is_alive() and not any(record["step"] >= step for record in read_records(metrics)):
        time.sleep(0.01)
    time.sleep(delay)
    for victim in victims:
        victim.kill()
