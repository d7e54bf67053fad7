"""The message about a hang: from a record of each rank to the lines that a user reads."""

import dataclasses
import math
from collections.abc import Callable

from runtime.hang import stacks

TRAINING, WAITING_FOR_DATA = "training", "waiting for data"  # phases
NAMED = 8  # ranks that a message names; it counts the others


@dataclasses.dataclass
class Activity:
    """What the main thread of this process does. metrics/recorder.py keeps it up to date."""

    step: int = 0  # the step that is computed, logged, evaluated or saved
    phase: str = "before the first step"
    micro_step: int = 0  # 0: outside forward and backward
    micro_steps: int = 1
    report_failure: Callable[[str], None] | None = None  # what an error that ends the process is also told to

    def __str__(self) -> str:
        phase = f"forward and backward, micro-step {self.micro_step} of {self.micro_steps}"
        return f"step {self.step}, {phase if self.micro_step and self.phase == TRAINING else self.phase}"


@dataclasses.dataclass
class Beat:
    """What one rank says of itself."""

    rank: int
    step: int
    activity: str
    where: str
    collective: str
    debugged: bool
    waited: float  # seconds in which the main thread has not left its place
    time: float  # of the clock of its node
    failure: str = ""  # why the rank has ended, unless another rank is the cause
    children: str = ""  # its processes that are stuck
    silent: float = 0.0  # seconds since this beat; the reader fills it in
    state: str = ""  # of the process, if the reader is on its node; the reader fills it in


@dataclasses.dataclass
class Peer:
    """A rank, as all ranks have learned it when they met."""

    node: str
    machine: str  # differs between nodes and between containers, also where their names are equal
    pid: int
    started: int
    time: float  # of its clock, when the ranks met


def explain(beats: list[Beat], peers: list[Peer], silent: float) -> str:
    """Two lines: the rank that is missing and what the others wait in; and what to look at.

    `beats` has one of each rank. A rank without a beat for `silent` seconds counts as silent.
    """
    waiting = [beat for beat in beats if _waits(beat, silent)]
    missing = [beat for beat in beats if beat not in waiting]
    groups: dict[str, list[int]] = {}
    for beat in waiting:
        place = "for" if beat.collective == stacks.GPU else "in"
        groups.setdefault(f"{place} {beat.collective} of step {beat.step}, {beat.where}", []).append(beat.rank)
    if not missing and len(groups) == 1:
        return (
            f"all ranks wait {next(iter(groups))}\n"
            "look at the network between the nodes and at the GPUs; --flight_recorder shows the last collectives"
        )
    remedy = "every rank must enter every collective: compare the stacks"
    cause = ""
    if missing:
        # An error comes first, then a process that is known to stand still: it explains the others.
        first = min(missing, key=lambda beat: (not beat.failure, not beat.state, beat.silent <= silent, beat.rank))
        others = [beat.rank for beat in missing if _condition(beat, silent)[1] == _condition(first, silent)[1]]
        condition, remedy = _condition(first, silent)
        peer = peers[first.rank]
        cause = f"rank {first.rank} ({peer.node}, pid {peer.pid}) {condition}"
        if len(others) > 1 and first.silent < math.inf:
            cause += f"; also {_ranks(others[1:])}"
        remedy = remedy.format(node=peer.node, pid=peer.pid, rank=first.rank)
    elsewhere = sorted(groups.items(), key=lambda group: len(group[1]))  # the fewest first: they skipped a collective
    waits = [f"{_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''} {where}" for where, ranks in elsewhere[:NAMED]]
    return f"{'; '.join(filter(None, [cause, *waits]))}\n{remedy}"


def _waits(beat: Beat, silent: float) -> bool:
    """Whether a rank runs, and waits for other ranks."""
    waits = beat.collective not in ("", WAITING_FOR_DATA)
    return waits and not (beat.failure or beat.state or beat.silent > silent)


def _condition(beat: Beat, silent: float) -> tuple[str, str]:
    """Why a rank does not wait for others, in words for the message, and what to look at."""
    if beat.failure:
        return f"has failed: {beat.failure}", "look at the output of rank {rank}"
    if beat.state:
        remedy = {
            stacks.STATES["Z"]: "look for its error, and in the kernel's log (dmesg) for a process out of memory",
            stacks.STATES["T"]: "continue it with `kill -CONT {pid}` on {node}, or end the run",
            stacks.STATES["t"]: "leave the debugger, or raise --ddp_timeout",
        }
        return beat.state, remedy.get(beat.state, "look at the disks and the drivers of {node}")
    if beat.silent == math.inf:
        return "cannot be asked, because the node of rank 0, which keeps the store of the ranks, does not answer", (
            "look whether the node of rank 0 is up and reachable, and whether rank 0 and torchrun run there"
        )
    if beat.silent > silent:
        return f"has not been heard of for {beat.silent:.0f} s", (
            "look whether {node} is up and reachable, and at the state of this process: ps -o stat,wchan {pid}"
        )
    place = f"is in {beat.activity}, {beat.where}, for {beat.waited:.0f} s"
    if beat.children:
        return f"{place}: {beat.children}", "look at these processes; --dataloader_num_workers 0 reads without them"
    if beat.debugged:
        return f"{place}, in a debugger", "leave the debugger, or raise --ddp_timeout"
    if beat.collective == WAITING_FOR_DATA:
        return place, "look at the disk of the data, and at the workers of the loader"
    return place, "look at its stack: a loop without end, a disk that hangs, or a collective that it has skipped"


def _ranks(ranks: list[int]) -> str:
    """The numbers of ranks, for a message: "ranks 0, 1, 3", or with a count of those beyond NAMED."""
    named = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"
