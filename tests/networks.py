"""Hosts on one machine: network namespaces that a switch joins, and whose links can be cut. For root alone."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from tests.patience import PATIENCE
from tests.servers import S3Server

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


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

    @contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """This thread is there, and so are the threads and processes that it starts."""
        with open("/proc/thread-self/ns/net") as outside, open(f"/run/netns/{self._namespace(host)}") as own:
            _enter(own.fileno())
            try:
                yield
            finally:
                _enter(outside.fileno())

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


@contextmanager
def moto_on(hosts: Network, host: int, bucket: str) -> Iterator[S3Server]:
    """An object storage on a host of its own, with a bucket, for the others."""
    address = hosts.address(host)
    command = [*hosts.on(host), sys.executable, "-m", "moto.server", "-H", address, "-p", "9000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = S3Server(endpoint=f"http://{address}:9000", access_key="moto", secret_key="moto", region="us-east-1")
    try:
        made = [*hosts.on(0), sys.executable, "-c", _MAKE_BUCKET, json.dumps(server.environment()), bucket]
        subprocess.run(made, check=True, timeout=PATIENCE)
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE)


_MAKE_BUCKET = """\
import json, os, sys, time
os.environ.update(json.loads(sys.argv[1]))
import boto3
while True:
    try:
        boto3.client("s3").create_bucket(Bucket=sys.argv[2])
        break
    except Exception:
        time.sleep(0.2)
"""


@cache
def can_make_networks() -> bool:
    """Whether the system lets this process do it."""
    try:
        with network(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
