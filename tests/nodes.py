"""Nodes of a Ray cluster that runs already: real raylets of this machine, as process groups."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from counterweight.pipeline.cluster import ENVIRONMENT
from tests.networks import Network
from tests.pipeline.tiny import until

HEAD = 0
"""The node that is started first, and does no work."""

STARTS = 3


class Nodes:
    """Nodes 0, 1, ..., each on a host of `network`; without one all on addresses of the loopback interface."""

    def __init__(self, folder: Path, network: Network | None) -> None:
        self._folder, self._network = folder, network
        self._groups = dict[int, subprocess.Popen[bytes]]()
        self.head = ""

    def start(self, number: int, cpus: int = 1) -> None:
        """The first has to be `HEAD`. A node that does not come up is started again: its ports were free when they were chosen,
        and may be somebody else's by now."""
        for _ in range(STARTS):
            if number == HEAD:
                self.head = f"{self._address(HEAD)}:{_free_port()}"
            process = self._started(number, cpus)
            until(lambda: "Ray runtime started" in self._log(number) or process.poll() is not None)  # noqa: B023
            if process.poll() is None:
                return
        raise AssertionError(f"node {number} did not start {STARTS} times: {self._log(number)}")

    def _started(self, number: int, cpus: int) -> subprocess.Popen[bytes]:
        port = self.head.rpartition(":")[2]
        role = (
            ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self._folder}"]
            if number == HEAD
            else [f"--address={self.head}", f"--num-cpus={cpus}"]
        )
        command = [
            *([] if self._network is None else self._network.on(number)),
            *(Path(sys.executable).with_name("ray").as_posix(), "start", *role),
            *(f"--node-ip-address={self._address(number)}", f"--dashboard-agent-listen-port={_free_port()}"),
            *("--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block"),
        ]
        log = (self._folder / f"node-{number}.log").open("wb")
        environment = {**os.environ, **ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._groups[number] = process
        return process

    def kill(self, number: int) -> None:
        """With everything that runs on it."""
        process = self._groups.pop(number)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def ended(self, number: int) -> bool:
        """Whether a node has ended by itself."""
        return self._groups[number].poll() is not None

    def stop(self) -> None:
        """All of them; what they would do at a peaceful end takes half a minute, and is of no use here."""
        for number in list(self._groups):
            if not self.ended(number):
                self.kill(number)

    def _log(self, number: int) -> str:
        return (self._folder / f"node-{number}.log").read_text()

    def _address(self, number: int) -> str:
        return f"127.0.0.{number + 2}" if self._network is None else self._network.address(number)


@contextmanager
def nodes(network: Network | None = None) -> Iterator[Nodes]:
    """None yet; those that are started are stopped at the end. The environment must say RAY_AUTH_MODE=disabled."""
    folder = Path(tempfile.mkdtemp(prefix="cw-"))  # of sockets, whose paths must be short
    made = Nodes(folder, network)
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def two_workers() -> Sequence[str]:
    """Settings of a run on two nodes of one CPU each."""
    return ("--set", "spec.resources={workers: 2, cpus_per_worker: 1}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
