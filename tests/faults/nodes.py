"""Two nodes on one machine: namespaces with their own network, host name, processes and mounts.

    node0 ── eth0 ── bridge ── eth0 ── node1

A third network namespace is the switch. When its bridge loses the port of a node, packets vanish without an error, as
with a cut cable. A slow link has two bridges, and this module relays between them, because few kernels have netem.

The first process of each namespace reads a pipe whose other end belongs to the test. That process ends with the test,
however the test ends. The kernel then kills all other processes of the namespace, and removes its interfaces and
mounts.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from tests.launch import ROOT

NETWORK = "10.77.0"
DEADLINE = 300  # seconds: what lasts longer hangs
Launchers = list["subprocess.Popen[bytes]"]
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
CLONE_NEWNS = 0x00020000  # linux/sched.h


@dataclass
class Namespace:
    """Namespaces, as options of unshare, and the process that holds them."""

    kinds: tuple[str, ...]
    holder: "subprocess.Popen[bytes]"
    pid: int  # of the first process within

    def command(self, *words: object, cwd: Path = ROOT) -> list[str]:
        """A command line that runs `words` in the namespaces."""
        return ["nsenter", f"--target={self.pid}", *self.kinds, f"--wd={cwd}", "--", *map(str, words)]

    def call(self, *words: object) -> str:
        """Run a command in the namespaces, and return what it prints. It must succeed."""
        run = subprocess.run(self.command(*words), capture_output=True, text=True)
        assert run.returncode == 0, (words, run.stderr)
        return run.stdout

    def end(self) -> None:
        """End the first process. In a PID namespace, all others are killed."""
        self.holder.kill()
        self.holder.wait()
        for pipe in (self.holder.stdin, self.holder.stdout, self.holder.stderr):
            if pipe:
                pipe.close()


def make_namespace(*kinds: str) -> Namespace:
    """New namespaces of these kinds. Raises OSError where they are not permitted."""
    private = ["--mount-proc"] * ("--pid" in kinds)
    # Nodes have not booted at the same moment.
    private += [f"--{clock}={random.randrange(1000000)}" for clock in ("monotonic", "boottime") if "--time" in kinds]
    command = ["unshare", "--fork", "--kill-child", *kinds, *private, "sh", "-c", "echo; exec cat"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert holder.stdout
    assert holder.stderr
    if not holder.stdout.readline():
        raise OSError(holder.stderr.read().decode().strip())
    child = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()  # unshare forks: --pid needs it
    return Namespace(kinds, holder, int(child))


@dataclass
class Node(Namespace):
    """A node, with a directory for the output of its processes."""

    directory: Path
    name: str
    address: str

    @property
    def log(self) -> str:
        """All that the processes of the node have printed."""
        return (self.directory / "log").read_text()

    def start(self, *words: object, **environment: str) -> "subprocess.Popen[bytes]":
        """Start a command on the node."""
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        with open(self.directory / "log", "ab") as log:
            return subprocess.Popen(self.command(*words), env=variables, stdout=log, stderr=log)

    def processes(self) -> list[str]:
        """The command lines of the Python processes on the node that have not ended."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                if (process / "ns/pid").readlink() == Path(f"/proc/{self.pid}/ns/pid").readlink():
                    words = (process / "cmdline").read_text().split("\0")
                    found += [" ".join(words)] * ("python" in words[0])
        return found

    def set_hosts(self, names: dict[str, str]) -> None:
        """Make these names and addresses all that the node knows of host names, but for localhost."""
        path = self.directory / "hosts"
        fresh = not path.exists()
        lines = "".join(f"{address} {name}\n" for name, address in names.items())
        path.write_text(f"127.0.0.1 localhost\n::1 localhost\n{lines}")
        if fresh:
            self.call("mount", "--bind", path, "/etc/hosts")


@dataclass
class Nodes:
    """Two nodes and the switch between them."""

    directory: Path
    switch: Namespace
    bridges: tuple[str, str]
    nodes: list[Node]

    def boot(self, number: int) -> None:
        """Start a node, for the first time or after its end."""
        space = make_namespace("--net", "--uts", "--mount", "--ipc", "--pid", "--time")
        path = self.directory / f"node{number}"
        path.mkdir(parents=True, exist_ok=True)
        node = Node(space.kinds, space.holder, space.pid, path, path.name, f"{NETWORK}.{number + 1}")
        self.nodes[number:] = [node, *self.nodes[number + 1 :]]
        self.switch.call("sh", "-c", f"ip link delete port{number} 2>&1 || true")  # of a node that has just ended
        # A node keeps its hardware address. With another one, it would be unreachable for a minute or more: the other
        # node sends to the old address, until its kernel asks again, and meanwhile its retries become rare.
        peer = ("peer", "name", "eth0", "address", f"02:00:00:00:00:0{number + 1}", "netns", node.pid)
        self.switch.call("ip", "link", "add", f"port{number}", "type", "veth", *peer)
        self.switch.call("ip", "link", "set", f"port{number}", "master", self.bridges[number], "up")
        node.call("ip", "link", "set", "lo", "up")
        node.call("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
        node.call("ip", "link", "set", "eth0", "up")
        node.call("hostname", node.name)
        (node.directory / "hosts").unlink(missing_ok=True)
        node.set_hosts({f"node{other}": f"{NETWORK}.{other + 1}" for other in range(2)})

    def end(self) -> None:
        """End both nodes and all their processes."""
        for node in self.nodes:
            node.end()

    def cut(self) -> None:
        """Cut the cable of node 1: packets vanish, and no interface goes down."""
        self.switch.call("ip", "link", "set", "port1", "nomaster")

    def mend(self) -> None:
        """Plug the cable of node 1 in again."""
        self.switch.call("ip", "link", "set", "port1", "master", self.bridges[1])

    def torchrun(
        self, rendezvous: str, argv: Sequence[object], *words: object, **variables: str | tuple[str, str]
    ) -> Launchers:
        """Start train.py with torchrun on both nodes, two ranks each, by `static` or `c10d` rendezvous.

        `words` are more options of torchrun. A variable has one value, or one for each node.
        """
        return [
            self.torchrun_on(
                number,
                rendezvous,
                argv,
                *words,
                **{name: value if isinstance(value, str) else value[number] for name, value in variables.items()},
            )
            for number in range(2)
        ]

    def torchrun_on(
        self, number: int, rendezvous: str, argv: Sequence[object], *words: object, **variables: str
    ) -> "subprocess.Popen[bytes]":
        """Start the torchrun of one of the nodes."""
        if rendezvous == "static":
            meet = ["--node_rank", number, "--master_addr", self.nodes[0].address, "--master_port", 29500]
        else:
            meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29500", "--rdzv_id", "job"]
            meet += ["--rdzv_conf", "read_timeout=900,join_timeout=900"]
        command = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 2, *meet, *words]
        return self.nodes[number].start(sys.executable, *command, ROOT / "train.py", *argv, **variables)

    def log(self) -> str:
        """All that was printed on both nodes."""
        return "\n".join(node.log for node in self.nodes)


def exit_codes(launchers: Launchers) -> list[int | None]:
    """Wait for the end of commands and give their exit codes; None for a command that hangs."""
    deadline = time.monotonic() + DEADLINE
    for launcher in launchers:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(max(0.1, deadline - time.monotonic()))
    return [launcher.poll() for launcher in launchers]


@contextmanager
def two_nodes(directory: Path, delay: float = 0) -> Iterator[Nodes]:
    """Two nodes whose packets need `delay` seconds from one to the other."""
    with ExitStack() as stack:
        switch = make_namespace("--net")
        stack.callback(switch.end)
        nodes = Nodes(directory, switch, ("bridge", "bridge1" if delay else "bridge"), [])
        stack.callback(nodes.end)
        for bridge in set(nodes.bridges):
            switch.call("ip", "link", "add", bridge, "type", "bridge")
            switch.call("ip", "link", "set", bridge, "up")
        nodes.boot(0)
        nodes.boot(1)
        if delay:
            words = switch.command(sys.executable, "-m", "tests.faults.nodes", delay, *nodes.bridges)
            relaying = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(relaying.communicate)  # closes its standard input
            assert relaying.stdout
            assert relaying.stdout.readline() == b"ready\n"
        yield nodes


@cache
def not_permitted() -> str:
    """Why this machine cannot make nodes; "" if it can."""
    try:
        make_namespace("--net", "--uts", "--mount", "--ipc", "--pid", "--time").end()
        space = make_namespace("--net")
        space.call("ip", "link", "add", "bridge", "type", "bridge")
        space.end()
    except (OSError, AssertionError) as error:
        return f"namespaces of network, mounts and processes need root and iproute2: {error}"
    return ""


def on_nodes(nodes: Nodes, more: dict[str, str] | None = None) -> Callable[[], None]:
    """What tests/launch.py must call in each rank first, to put ranks 0 and 1 on node 0, and 2 and 3 on node 1."""
    first = nodes.nodes[0].address
    return partial(_enter_node, [node.pid for node in nodes.nodes], {"MASTER_ADDR": first} | (more or {}))


def _enter_node(pids: list[int], variables: dict[str, str]) -> None:
    """Move this process, which has one thread yet, to its node. Rank 0 hosts the store."""
    number, local_rank = divmod(int(os.environ["RANK"]), 2)
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts", "mnt"):
        with open(f"/proc/{pids[number]}/ns/{kind}") as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
    # This process is not in the PID namespace of the node, so it needs a /proc of its own.
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"proc", b"/proc", b"proc", 0, None):
        raise OSError(ctypes.get_errno(), "/proc")
    os.chdir(ROOT)
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE="2", MASTER_PORT="29400")
    os.environ.update(variables)


def relay(delay: float, bridges: Sequence[str]) -> None:
    """Carry each packet between two bridges after `delay` seconds, until standard input is closed."""
    taps = []
    for number, bridge in enumerate(bridges):
        tap = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", f"tap{number}".encode(), IFF_TAP | IFF_NO_PI))
        subprocess.run(["ip", "link", "set", f"tap{number}", "master", bridge, "up"], check=True)
        taps.append(tap)
    print("ready", flush=True)
    underway: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
        readable, _, _ = select.select([0, *taps], [], [], wait)
        if 0 in readable:
            return
        for number, tap in enumerate(taps):
            if tap in readable:
                count += 1
                heapq.heappush(underway, (time.monotonic() + delay, count, taps[1 - number], os.read(tap, 65536)))
        while underway and underway[0][0] <= time.monotonic():
            os.write(underway[0][2], heapq.heappop(underway)[3])


if __name__ == "__main__":
    relay(float(sys.argv[1]), sys.argv[2:])
