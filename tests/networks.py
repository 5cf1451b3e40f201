"""Hosts on one machine: network namespaces that a switch joins, and whose links can be cut. For root alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


class Network:
    """hosts: how many. Made and taken down by `network`."""

    def __init__(self, hosts: int) -> None:
        self._name = f"cw{os.getpid()}"
        self.hosts = hosts

    def address(self, host: int) -> str:
        """Of a host, from 0."""
        return f"10.77.0.{host + 1}"

    def on(self, host: int) -> list[str]:
        """What a command begins with that is to run there."""
        return ["ip", "netns", "exec", self._namespace(host)]

    def cut(self, host: int) -> None:
        """Packets from and to it are lost from now on; connections stay open."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        """They arrive again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def up(self) -> None:
        """Makes the hosts."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            own = self._namespace(host)
            _ip("netns", "add", own)
            pair = ("type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("-n", self._switch, "link", "add", f"port{host}", *pair)
            _ip("-n", self._switch, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", own, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", own, "link", "set", device, "up")

    def down(self) -> None:
        """Takes away what there is of it."""
        for name in (*map(self._namespace, range(self.hosts)), self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @property
    def _switch(self) -> str:
        return f"{self._name}-switch"

    def _namespace(self, host: int) -> str:
        return f"{self._name}-{host}"


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """Hosts that reach each other, and nobody else."""
    made = Network(hosts)
    try:
        made.up()
        yield made
    finally:
        made.down()


@cache
def can_make_networks() -> bool:
    """Whether the system lets this process do it."""
    try:
        with network(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
