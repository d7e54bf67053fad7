"""The network between nodes: the interface through which a node reaches the others."""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from config.errors import first_line

SIOCGIFADDR = 0x8915  # Linux: asks for the IPv4 address of an interface


def choose_interface() -> None:
    """Let gloo use the interface through which this node reaches MASTER_ADDR: sets GLOO_SOCKET_IFNAME.

    By default, gloo takes the address that the node's own host name has. In a container it often has none; on Debian
    it is 127.0.1.1; on a node with several networks, other nodes may not reach it. Ranks of several nodes would then
    wait for each other. They do reach MASTER_ADDR, because they meet there first. Changes nothing on one node, where
    the user has set the variable, or where no single interface is found.
    """
    ranks, host = os.environ.get("WORLD_SIZE", "1"), os.environ.get("MASTER_ADDR", "localhost")
    one_node = ranks == os.environ.get("LOCAL_WORLD_SIZE", "1") or host in ("localhost", "127.0.0.1", "::1")
    if not one_node and "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(host)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface(host: str) -> str:
    """The interface that reaches `host`, or the only one beside the loopback; "" if there is no such interface."""
    interfaces = _addresses()
    with suppress(OSError):  # without an address or a way, torch's own error about MASTER_ADDR follows
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing, but the system chooses the interface
                name = interfaces.get(probe.getsockname()[0])
            if name:
                return name
    # A node may know its own name by a loopback address alone.
    others = set(interfaces.values())
    return others.pop() if len(others) == 1 else ""


def _addresses() -> dict[str, str]:
    """The interface of each address of this node, without loopback; {} if the system is not Linux."""
    found = {}
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[socket.inet_ntop(socket.AF_INET, answer[20:24])] = name
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, _, _, scope, _, name = line.split()
            if scope == "00":  # global
                found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))] = name
    return {address: name for address, name in found.items() if name != "lo"}


def network_failure(error: Exception) -> str:
    """The mistake of the user that gloo's error of connecting the ranks comes from, with its remedy; "" if none."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    remedy = (
        "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME with GPUs, on each node to the network interface that reaches\n"
        "the other nodes; `ip address` lists the interfaces"
    )
    if name and "Unable to find" in str(error):
        return f"GLOO_SOCKET_IFNAME {name}: {socket.gethostname()} has no such network interface\n{remedy}"
    if "connectFullMesh failed" in str(error) or "gloo/transport" in str(error):
        used = f"GLOO_SOCKET_IFNAME {name}" if name else f"the host name {socket.gethostname()}"
        return f"{used}: gloo cannot reach the other ranks from its address: {first_line(error)}\n{remedy}"
    return ""
