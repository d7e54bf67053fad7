"""Explains a hang: which rank is missing, what the others wait for, and what to look at.

Each rank has a thread that sends a small record of its main thread, a beat, to the store where the ranks have met. The
store needs no collective, so it answers while the ranks are stuck in one. With torchrun, its agent has the store, so
it answers also when rank 0 is stopped. When it does not answer, the node of the store is what the message names.

A rank reports when it has waited in a collective until shortly before --ddp_timeout, or when a collective has failed,
or earlier when another rank sends no beats at all or has ended. One rank prints. Every rank that can writes its stacks
to output_dir/hang. Then the thread ends a rank that still waits: gloo raises an error, but NCCL ends a process a minute
after the timeout, and a rank that waits for the GPU cannot end itself. The thread takes a millisecond every few
seconds, and never synchronizes with the GPU.
"""

import dataclasses
import faulthandler
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed.distributed_c10d import _get_default_store

from config.errors import first_line
from runtime.hang import stacks
from runtime.hang.explain import TRAINING, WAITING_FOR_DATA, Activity, Beat, Peer, explain

BEATS = 20  # of each rank within --ddp_timeout; at least one in LONGEST seconds
LONGEST = 2.0
AHEAD = 6  # beats before the timeout, a rank that waits in a collective reports the hang
PATIENCE = 60.0  # seconds; a rank without a beat for so long is reported earlier
SOON = 5.0  # seconds; a rank that has waited for so long looks whether a process of its node has ended
GRACE = 3.0  # seconds after a collective should have failed, or after the report of a rank that has ended
RECORDINGS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}  # torch's last collectives, as JSON
OF_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|process group", re.IGNORECASE)


ACTIVITY = Activity()
_watch: "Watch | None" = None


def watch_ranks(output_dir: str, timeout: float, flight_recorder: bool) -> None:
    """Start to watch this rank and the others until the process ends. Every rank must call, and all are in step then.

    `timeout` is that of collectives, in seconds. With `flight_recorder`, a hang also writes the last collectives.
    """
    global _watch
    _watch = Watch(Path(output_dir) / "hang", timeout, flight_recorder)
    threading.Thread(target=_watch.run, name="watch", daemon=True).start()


def explain_failure(error: Exception) -> bool:
    """Tell the other ranks of an error that ends this one. Returns whether a message about a hang explains it."""
    return _watch is not None and _watch.failed(error)


def node_of_rank(rank: int) -> str:
    """The name of the node of a rank; its number if the ranks are not watched."""
    return _watch.peers[rank].node if _watch else f"rank {rank}"


class Watch:
    """The watching thread of a rank, and what it knows."""

    def __init__(self, directory: Path, timeout: float, flight_recorder: bool) -> None:
        self.directory = directory
        self.timeout = timeout
        self.flight_recorder = flight_recorder
        self.interval = min(LONGEST, timeout / BEATS)
        self.patience = min(PATIENCE, timeout / 2)
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        machine = stacks.machine()
        self.me = Peer(socket.gethostname(), machine, os.getpid(), stacks.started(os.getpid()), time.monotonic())
        if self.rank == 0:
            self._prepare_directory()
        self.peers: list[Peer] = [self.me] * world_size
        dist.all_gather_object(self.peers, self.me)
        self.met = time.monotonic()
        self.store = dist.PrefixStore("watch", _get_default_store().clone())  # type: ignore[attr-defined]
        self.asking: threading.Thread | None = None  # waits for an answer of the store
        self.place, self.key = stacks.Place("", "", False, False), (0, 0)
        self.since = self.looked = time.monotonic()
        self.failure = self.trace = ""
        self.ended = 0.0  # when this rank has heard that another one has ended
        self.over = self.reported = self.printed = self.written = False
        self.lock, self.pause = threading.RLock(), threading.Event()

    def _prepare_directory(self) -> None:
        """Put the files of an earlier hang aside."""
        with suppress(OSError):  # a hang will be explained all the same
            if self.directory.exists() and any(self.directory.iterdir()):
                self.directory.rename(f"{self.directory}-put-aside-{uuid.uuid4().hex[:8]}")
            if self.flight_recorder:  # NCCL does not create it
                self.directory.mkdir(exist_ok=True)

    def run(self) -> None:
        """Send beats, and report a hang. For a thread of its own.

        Some calls hold the interpreter, so no thread of Python runs until they return. The launch of a compiled kernel
        is one, and it does not return while the queue of a GPU that waits is full
        (https://github.com/pytorch/pytorch/issues/109074). Then a thread of C, started anew at each beat, prints the
        stacks. It does not end the process, because it cannot know whether somebody has only paused it.
        """
        while True:
            with suppress(Exception):  # nothing here may end a run
                faulthandler.dump_traceback_later(self.timeout + GRACE, file=2)
            with suppress(Exception), self.lock:
                self._beat()
            self.pause.wait(self.interval)

    def _beat(self) -> None:
        if not self.over:
            self._look_at_main()
        if self._send():
            self._write_stacks()
        loading = self.place.collective == WAITING_FOR_DATA
        if not self.place.collective or self.over or (loading and not stacks.stuck_children()):
            return
        now = time.monotonic()
        if loading and self.reported and now - self.since > self.timeout and stacks.stuck_children("Tt"):
            self._end_loader()
        if not loading and self.written and self._must_end(now):
            self._end(
                "another rank has ended" if self.ended else f"a collective has not ended within {self.timeout:g} s"
            )
        if now - self.since > self.timeout - AHEAD * self.interval or (
            now - self.since > SOON and self._has_lost_one()
        ):
            self._report()
        elif now - self.looked > self.patience:
            self.looked = now
            if self._some_rank_is_silent():
                self._report()

    def _end_loader(self) -> None:
        """End this rank, because a worker of its loader is stuck. torch would wait for it for ever."""
        for pid in stacks.stuck_children("Tt"):
            os.kill(pid, signal.SIGKILL)  # a stopped process would stay
        self._end(f"no data for --ddp_timeout {self.timeout:g} s")

    def _end(self, reason: str) -> None:
        if self.printed or self.place.collective == WAITING_FOR_DATA:
            print(f"train.py: error: rank {self.rank}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def _has_lost_one(self) -> bool:
        """Whether the process of another rank of this node has ended."""
        others = (peer for peer in self.peers if peer is not self.me and self._sees(peer))
        return any(stacks.process_state(peer.pid, peer.started) == stacks.STATES["Z"] for peer in others)

    def _must_end(self, now: float) -> bool:
        """Whether this rank, which waits after a report, can only end."""
        if not self.ended and self._ask(lambda: self.store.check(["ended"])):
            self.ended = now
        return now > (self.ended or self.since + self.timeout) + GRACE

    def _look_at_main(self) -> None:
        place, key = stacks.place_of_main()
        if ACTIVITY.phase == WAITING_FOR_DATA:  # the loader's loop moves, because it looks after its workers
            place, key = place._replace(collective=WAITING_FOR_DATA), (0, ACTIVITY.step)
        now = time.monotonic()
        if key != self.key:
            self.since = self.looked = now
        elif not place.collective and self._launches(place) and now - self.since > self.patience:
            place = place._replace(collective=stacks.GPU)
        self.place, self.key = place, key

    def _launches(self, place: stacks.Place) -> bool:
        """Whether a call at `place` may start a kernel. It does not return while the queue of a waiting GPU is full."""
        computes = ACTIVITY.phase == TRAINING and ACTIVITY.micro_step > 0
        uses_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return uses_gpu and computes and not place.in_library and not place.debugged

    def failed(self, error: Exception) -> bool:
        """Tell the other ranks of `error`. Returns whether it follows from a hang that a message explains."""
        with self.lock:
            self.over = True
            if isinstance(error, torch.OutOfMemoryError) or not OF_COMMUNICATION.search(str(error)):
                self.failure = f"{type(error).__name__}: {first_line(error)}".removeprefix("OptionError: ")
                self._send()
                return False
            self.trace = "".join(traceback.format_exception(error))
            place = stacks.place_of_error(error)
            self.place = place if place.collective else self.place
            self._send()
            self._report()
            if self.printed:
                print(f"train.py: error: {first_line(error)}", file=sys.stderr, flush=True)
            return self.reported

    def _send(self) -> bool:
        """Send a beat. Returns whether a rank has found a hang."""
        waited = time.monotonic() - self.since
        place, step, children = self.place, ACTIVITY.step, ", ".join(stacks.stuck_children().values())
        where = place.where, place.collective, place.debugged
        beat = Beat(self.rank, step, str(ACTIVITY), *where, waited, time.monotonic(), self.failure, children)
        text = json.dumps(dataclasses.asdict(beat))

        def send() -> bool:
            self.store.set(f"beat/{self.rank}", text)
            return self.store.check(["hang"])

        return bool(self._ask(send))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer to a question to the store; None if it does not answer, as when its process is stopped."""
        if self.asking and self.asking.is_alive():
            return None
        answers: list[Any] = []

        def ask() -> None:
            with suppress(Exception):  # the node of the store is gone
                answers.append(question())

        self.asking = threading.Thread(target=ask, name="watch, asking", daemon=True)
        self.asking.start()
        self.asking.join(min(30.0, 0.2 * self.timeout))
        return answers[0] if answers else None

    def _some_rank_is_silent(self) -> bool:
        """Whether a rank has sent no beat for so long as is reported before the timeout. One rank at a time looks."""
        found = False
        if self._ask(lambda: self.store.add("looking", 1)) == 1:
            found = any(beat.silent > self.patience for beat in self._read())
            self._ask(lambda: self.store.delete_key("looking"))
        return found

    def _report(self) -> None:
        """Print the message about a hang, unless another rank does, and write this rank's stacks."""
        if self.reported:
            return
        self.reported = True
        claims = self._ask(lambda: self.store.add("claims", 1))
        if claims == 1:
            self._ask(lambda: self.store.set("hang", "1"))  # now every rank that can writes its stacks
            beats = self._read()
            if not any(beat.state or beat.failure for beat in beats):
                self.pause.wait(2.5 * self.interval)  # every rank that can sends another beat
                beats = self._read()
        elif claims is None:  # the store does not answer: the first rank of each node that runs prints
            beats = self._read()
            running = [beat.rank for beat in beats if self._sees(self.peers[beat.rank]) and not beat.state]
            claims = 1 + running.index(self.rank)
        if claims == 1:
            silent = max(2.5 * self.interval, min(self.patience, (time.monotonic() - self.since) / 2))
            message = explain(beats, self.peers, silent)
            output = f"stacks of the ranks: {self.directory}/rank-*.txt; a collective fails after --ddp_timeout "
            output += f"{self.timeout:g}; see docs/troubleshooting.md#hangs"
            print(f"{message}\n{output}", file=sys.stderr, flush=True)
            self.printed = True
            if any(beat.failure or beat.state == stacks.STATES["Z"] for beat in beats):
                self._ask(lambda: self.store.set("ended", "1"))
            self._ask(lambda: self.store.set("printed", "1"))
        else:  # torchrun ends all ranks when one has ended: wait for the message
            self._ask(lambda: self.store.wait(["printed"], timedelta(seconds=5 * self.interval)))
        self._write_stacks()

    def _read(self) -> list[Beat]:
        """The last beat of each rank, and the state of the processes of this node."""

        def read() -> list[str]:
            keys = [f"beat/{rank}" for rank in range(len(self.peers))]
            return [self.store.get(key).decode() if self.store.check([key]) else "" for key in keys]

        beats = []
        texts = self._ask(read)
        for rank, (text, peer) in enumerate(zip(texts or [""] * len(self.peers), self.peers, strict=True)):
            beat = Beat(**json.loads(text)) if text else Beat(rank, 0, "", "", "", False, 0.0, peer.time)
            # Each node has a clock of its own. When the ranks met, all looked at their clocks. It is the monotonic one,
            # because somebody may set the other one.
            beat.silent = time.monotonic() - self.met + peer.time - beat.time
            if texts is None:
                beat.silent = math.inf
            if self._sees(peer):
                beat.state = stacks.process_state(peer.pid, peer.started)
            if rank == self.rank:
                beat.silent, beat.activity, beat.where = 0.0, str(ACTIVITY), self.place.where
                beat.step, beat.collective = ACTIVITY.step, self.place.collective
            beats.append(beat)
        return beats

    def _sees(self, peer: Peer) -> bool:
        """Whether a rank is on this node, and its process is visible here."""
        return peer.machine == self.me.machine

    def _write_stacks(self) -> None:
        """Write where this rank is, once. The disk may hang, so a thread does it, for a limited time."""
        if self.written:
            return
        self.written = True
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        title = f"{now}: rank {self.rank} ({self.me.node}, pid {self.me.pid}) is in {ACTIVITY}\n"
        text = f"{title}\n{self.trace or stacks.stacks()}"

        def write() -> None:
            with suppress(OSError):
                self.directory.mkdir(exist_ok=True)
                (self.directory / f"rank-{self.rank}.txt").write_text(text)
                for backend, recording in RECORDINGS.items() if self.flight_recorder else ():
                    if hasattr(c10d, recording):
                        collectives: bytes = getattr(c10d, recording)()
                        (self.directory / f"rank-{self.rank}-{backend}.json").write_bytes(collectives)

        writer = threading.Thread(target=write, name="watch, writing", daemon=True)
        writer.start()
        writer.join(2.0)
