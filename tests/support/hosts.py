"""Two machines and their network, in this one: network namespaces behind a bridge. Needs root and `ip`.

They share files, memory and processes, and nothing of the network: a host whose link is cut is off for all others.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
CLIENTS = f"qwen-{os.getpid()}"
"""The namespace of the bridge and of those who ask."""


@dataclass(frozen=True)
class Host:
    """One of the two machines.

    Attributes:
        number: 1 or 2.
    """

    number: int

    @property
    def address(self) -> str:
        """Its IPv4 address, known to the other host and to the clients."""
        return f"10.77.0.{self.number}"

    @property
    def name(self) -> str:
        """The name of its namespace."""
        return f"{CLIENTS}-host{self.number}"

    @property
    def runs(self) -> tuple[str, ...]:
        """What to write before a command that this host is to run."""
        # vLLM would look the address up by a route to the outside, which there is none of. The hosts share
        # the cores: with threads for all of them, the processes of one model would wait seconds for each other.
        variables = (f"VLLM_HOST_IP={self.address}", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1")
        return ("ip", "netns", "exec", self.name, "env", *variables)

    def cut_off(self) -> None:
        """Take its cable out."""
        _ip(f"-n {CLIENTS} link set port{self.number} down")

    def reconnect(self) -> None:
        """Put its cable in again."""
        _ip(f"-n {CLIENTS} link set port{self.number} up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts, and meanwhile have this thread, and what it starts, in their network as a third one."""
    hosts = Host(1), Host(2)
    names = [CLIENTS, *(host.name for host in hosts)]
    with open("/proc/thread-self/ns/net") as before:
        try:
            for name in names:
                _ip(f"netns add {name}")
                _ip(f"-n {name} link set lo up")
            _ip(f"-n {CLIENTS} link add name net type bridge")
            _ip(f"-n {CLIENTS} address add 10.77.0.254/24 dev net")
            _ip(f"-n {CLIENTS} link set net up")
            for host in hosts:
                _ip(f"-n {CLIENTS} link add port{host.number} type veth peer name eth0 netns {host.name}")
                _ip(f"-n {CLIENTS} link set port{host.number} master net up")
                _ip(f"-n {host.name} address add {host.address}/24 dev eth0")
                _ip(f"-n {host.name} link set eth0 up")
            with open(f"/run/netns/{CLIENTS}") as clients:
                _enter(clients.fileno())
            yield hosts
        finally:
            _enter(before.fileno())
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "this needs root")
