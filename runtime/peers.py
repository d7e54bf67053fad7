"""The other ranks of a run: how they meet, also after a restart, and how each learns that another one has failed.

Ranks talk through a TCPStore. torchrun hosts it, or rank 0 with other launchers. Each process has a name of its own: a
restarted rank is another process. The keys of the store:

    call                     the process of rank 0 that asks who is there
    answer/CALL/RANK         the process of a rank that has answered
    group/CALL               the processes of all ranks, in order of rank: they form a process group of this name
    stop/CALL                why this process group is broken
    failed                   why a rank that belongs to no process group has failed, and will not be restarted
    place/RANK               where a rank is that has not met the others yet
    waiting                  the process that says that rank 0 is waited for
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from runtime.hang import waiting
from runtime.hang.stacks import place_of_main

INTERVAL = 1.0  # seconds between two looks at the store
GRACE = 6.0  # seconds from hearing of a failure to the end of a rank, in which its launcher or its own error may end it
LINGER = 10.0  # seconds in which a rank that fails waits until all others have heard of it
NAMED = 8  # ranks that a message names; it counts the others
RECONNECT = timedelta(seconds=5)


class Peers:
    """This process among the ranks of a run. A thread connects to the store and watches it until the process ends."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.process = uuid.uuid4().hex
        self.group = ""  # the process group that this process belongs to, once it has formed
        self.failing = False
        self.heard: dict[str, Any] = {}  # the failure of another rank
        self.printed = False
        self.connected = threading.Event()
        self.error: Exception | None = None
        self.store: dist.Store  # for the process group, which may wait in it
        self.watched: dist.Store  # its own connection, on which nothing waits
        if self.size > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def meet(self, timeout: timedelta) -> dist.Store:
        """A store that only the processes of all ranks use that are alive now. Every rank must call.

        torchrun keeps one store for all restarts of its workers, with static and with c10d rendezvous, and
        init_process_group uses it as it is. There a rank may find the address that an earlier process of another rank
        has written, and connect to nothing: https://github.com/pytorch/pytorch/issues/135712. A prefix of
        TORCHELASTIC_RESTART_COUNT is not enough, because each node counts its own restarts:
        https://github.com/pytorch/pytorch/issues/108158. So the ranks agree on a prefix of their own. Rank 0 calls with
        a new name, each rank answers that call, and the processes that have answered form the process group.

        Raises DistStoreError or DistNetworkError if the ranks do not meet within `timeout`.
        """
        if self.size == 1:
            return dist.HashStore()
        deadline = time.monotonic() + timeout.total_seconds()
        with waiting.explained(self._who_hosts):
            if not self.connected.wait(timeout.total_seconds()):
                raise dist.DistStoreError(f"no connection within {timeout.total_seconds():.0f} seconds")
        if self.error:
            raise self.error
        self.store.set_timeout(timeout)
        try:
            with waiting.explained(self._who_is_missing):
                self.group = self._call(timeout) if self.rank == 0 else self._answer(deadline)
        except dist.DistError:
            if self.heard:  # the store has ended with the rank that failed
                self._end()
            raise
        return dist.PrefixStore(self.group, self.store)

    def report(self, message: str, exit_code: int) -> None:
        """Tell the other ranks that this one fails. They end, too, unless the launcher ends or restarts them before."""
        self.failing = True
        if self.size == 1 or not self.connected.wait(RECONNECT.total_seconds()) or self.error:
            return
        restarts = [int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
        if self.group or restarts[0] >= restarts[1]:  # without a group, the others wait for the restarted rank
            _attempt(lambda: self._tell(message, exit_code), RECONNECT.total_seconds())

    def end_if_signaled(self) -> None:
        """End this rank if a signal has ended another one, as it has told. It is why a collective of this one fails."""
        if self.size > 1 and self.connected.is_set() and not self.error:
            _attempt(self._listen, RECONNECT.total_seconds())
            if self.heard.get("exit_code", 0) > 128:
                self._end()

    def linger(self) -> None:
        """Wait until all ranks know of the failure that this one has reported: the store may end with this process."""
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        if self.size == 1 or not self.connected.is_set() or self.error or (one_node and _has_agent()):
            return  # torchrun ends the other ranks of its node
        _attempt(self._wait_until_all_know, LINGER)

    def _tell(self, message: str, exit_code: int) -> None:
        self._stop(self._key(), message, exit_code)
        self.watched.add(f"{self._key()}/told", 1)

    def _listen(self) -> None:
        self.heard = self.heard or json.loads(_read(self.watched, self._key()) or "{}")

    def _wait_until_all_know(self) -> None:
        while self.watched.check([self._key()]) and self.watched.add(f"{self._key()}/told", 0) < self.size:
            time.sleep(0.1)

    def _call(self, timeout: timedelta) -> str:
        answers = [f"answer/{self.process}/{rank}" for rank in range(self.size)]
        self.store.set(answers[0], self.process)
        self.store.set("call", self.process)
        with suppress(dist.DistStoreError):
            self.store.wait(answers, timeout)
        if missing := self._missing(self.store):
            raise dist.DistStoreError(f"no answer from ranks {missing} within {timeout.total_seconds():.0f} s")
        self.store.set(f"group/{self.process}", json.dumps([self.store.get(answer).decode() for answer in answers]))
        return self.process

    def _missing(self, store: dist.Store) -> list[int]:
        """The ranks that have not answered the call of this process, which is rank 0."""
        return [rank for rank in range(self.size) if not store.check([f"answer/{self.process}/{rank}"])]

    def _who_hosts(self) -> str:
        """A message, once on each node: the store of the ranks cannot be reached."""
        address, host = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", int(not _has_agent())
        # On the node of rank 0, where rank 0 may be waited for, its next rank says it.
        if os.environ["LOCAL_RANK"] != str(host if self.rank < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else 0):
            return ""
        return f"waiting for {'rank 0' if host else 'torchrun'}, which has not opened {address} yet"

    def _who_is_missing(self) -> str:
        """A message of rank 0, or of one rank that waits for it: who has not come, and what they do."""
        with suppress(dist.DistError):
            if self.rank == 0:
                ranks = self._missing(self.watched)
            elif (call := _read(self.watched, "call")) and not _read(self.watched, f"group/{call}"):
                return ""  # rank 0 has come, and says who is waited for
            else:
                first = self.watched.compare_set("waiting", "", self.process).decode()
                ranks = [0] if first == self.process else []
            more = f"; and {len(ranks) - NAMED} more" if ranks[NAMED:] else ""
            return f"waiting for {'; '.join(self._places(ranks[:NAMED]))}{more}" if ranks else ""
        return ""

    def _places(self, ranks: list[int]) -> list[str]:
        """Where ranks are that have not met the others, in words. Takes some seconds, in which they say it."""
        keys = [f"place/{rank}" for rank in ranks]
        before = [_read(self.watched, key) for key in keys]
        for key in keys:
            self.watched.delete_key(key)
        time.sleep(5 * INTERVAL)
        words = []
        for rank, key, was in zip(ranks, keys, before, strict=True):
            place, gone = _read(self.watched, key), f"which does not run any more, or is stopped, and was in {was}"
            words.append(
                f"rank {rank}, {f'which is in {place}' if place else gone if was else 'which has not started'}"
            )
        return words

    def _answer(self, deadline: float) -> str:
        answered, pause = "", 0.01
        while time.monotonic() < deadline:
            call = _read(self.store, "call")
            if call and call != answered:
                self.store.set(f"answer/{call}/{self.rank}", self.process)
                answered = call
            if call and self.process in json.loads(_read(self.store, f"group/{call}") or "[]"):
                return call
            time.sleep(pause)
            pause = min(0.5, pause * 1.2)
        raise dist.DistStoreError("rank 0 did not call" if not answered else "rank 0 waits for other ranks")

    def _watch(self) -> None:
        try:
            self.store = self._connect(is_master=self.rank == 0 and not _has_agent())
            self.watched = self._connect(is_master=False)
            self._break_group_of_predecessor()
        except Exception as error:  # meet raises it
            self.error = error
            return
        finally:
            self.connected.set()
        while not self.failing:
            if not self.group:
                with suppress(dist.DistError):
                    self.watched.set(f"place/{self.rank}", f"{place_of_main()[0].where} on {socket.gethostname()}")
            time.sleep(INTERVAL)
            self.heard = self._failure()
            if self.heard:
                if self.heard["node"] != _node():  # on its own node, the rank itself prints
                    self._print()
                with suppress(dist.DistError):
                    self.watched.add(f"{self._key()}/told", 1)
                time.sleep(GRACE)
                with suppress(dist.DistError):  # of a store that has ended since
                    if not self.watched.check([self._key()]):
                        continue  # the rank has been restarted
                self._end()

    def _connect(self, is_master: bool, timeout: timedelta = timedelta(days=1)) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(
            address, port, is_master=is_master, timeout=timeout, wait_for_workers=False, multi_tenant=is_master
        )

    def _break_group_of_predecessor(self) -> None:
        """Let the ranks end that still belong to a process group with an earlier process of this rank.

        On other nodes they may wait for it in a collective, and only their end lets the launcher restart them.
        """
        call, failed = _read(self.watched, "call"), _read(self.watched, "failed")
        if call and self.process not in json.loads(_read(self.watched, f"group/{call}") or json.dumps([self.process])):
            self._stop(f"stop/{call}", "it has been restarted", 1)
        if failed and json.loads(failed)["rank"] == self.rank:
            self.watched.delete_key("failed")
            self.watched.delete_key("failed/told")

    def _key(self) -> str:
        return f"stop/{self.group}" if self.group else "failed"

    def _stop(self, key: str, message: str, exit_code: int) -> None:
        """Say why a process group is broken, or why this rank has failed, unless another rank was first."""
        failure = {"rank": self.rank, "node": _node(), "host": socket.gethostname(), "message": message}
        self.watched.compare_set(key, "", json.dumps(failure | {"exit_code": exit_code}))

    def _failure(self) -> dict[str, Any]:
        """What has been said to have failed; {} if nothing."""
        try:
            return json.loads(_read(self.watched, self._key()) or "{}")
        except dist.DistError:
            pass
        try:
            self.watched = self._connect(is_master=False, timeout=RECONNECT)  # only the connection was lost
        except dist.DistError:
            message = f"{'torchrun' if _has_agent() else 'rank 0'} has ended, and the store of all ranks with it"
            self.heard = {"rank": 0, "host": os.environ["MASTER_ADDR"], "message": message, "exit_code": 1}
            self._end()
        return {}

    def _print(self) -> None:
        """Print what has failed, once on each node."""
        if os.environ["LOCAL_RANK"] == "0" and not (self.failing or self.printed):
            self.printed = True
            failure = f"rank {self.heard['rank']} on {self.heard['host']}: {self.heard['message']}"
            print(f"train.py: error: {failure}", file=sys.stderr, flush=True)

    def _end(self) -> None:
        if not self.failing:
            self._print()
            os._exit(self.heard["exit_code"])


_peers: Peers | None = None


def join() -> Peers:
    """Connect to the other ranks, in a thread, as soon as the variables of the launcher are known."""
    global _peers
    _peers = Peers()
    return _peers


def meet(timeout: timedelta) -> dist.Store:
    """The store for init_process_group, as Peers.meet describes it. Every rank must call."""
    return (_peers or join()).meet(timeout)


def _node() -> str:
    return os.environ.get("GROUP_RANK", socket.gethostname())  # torchrun's number of this node


def _has_agent() -> bool:
    """Whether torchrun hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _attempt(talk: Callable[[], None], seconds: float) -> None:
    """Call `talk`, which asks the store, in a thread, and wait for its end so long at most.

    A store does not answer if the link to its node is cut, until the system gives the connection up after 15 minutes.
    """

    def talk_quietly() -> None:
        with suppress(dist.DistError):
            talk()

    thread = threading.Thread(target=talk_quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
