"""Starts daemons that outlive the command which started them, and stops exactly those, by process id."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PORTS = range(20000, 32000)  # below Linux's range for outgoing connections, 32768 to 60999


class StartError(Exception):
    """A server did not start; the text is one line, with the log that says why."""


def free_ports(count: int) -> list[int]:
    """Port numbers on the loopback interface that nobody listens on at the moment."""
    # Not from the kernel (port 0): those it would also give to the next outgoing connection of anybody.
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise StartError(f"no {count} free ports from {_PORTS.start} to {_PORTS.stop - 1}")


def start_daemon(directory: Path, name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
    """Starts `command` in a session of its own unless the one started earlier still runs. Its output goes
    to `<directory>/log/<name>.out`, its process id to `<directory>/run/<name>.json`."""
    record = directory / "run" / f"{name}.json"
    if record.exists() and _runs(json.loads(record.read_text())):
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    (directory / "log").mkdir(exist_ok=True)
    with (directory / "log" / f"{name}.out").open("ab") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    record.write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}))


def stop_daemons(directory: Path, *, patience: float = 5.0) -> None:
    """Stops every daemon started under `directory`, the last one first; kills what has not ended after
    `patience` seconds. Does nothing for those that are gone."""
    records = sorted((directory / "run").glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for record in records:
        process = json.loads(record.read_text())
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
            if _runs(process):
                os.kill(process["pid"], number)
                _poll(functools.partial(_ended, process), seconds)
        record.unlink()


def wait_for(directory: Path, name: str, ready: Callable[[], bool], seconds: float) -> None:
    """Polls `ready`; raises `StartError` when it is not true within `seconds` or the daemon ends before."""
    process = json.loads((directory / "run" / f"{name}.json").read_text())
    done = _poll(lambda: _ended(process) or ready(), seconds)
    if not _runs(process):
        raise StartError(f"{name} ended; its output is in {directory / 'log'}")
    if not done:
        raise StartError(f"{name} was not ready within {seconds:.0f} s; its output is in {directory / 'log'}")


def http_status(port: int, path: str) -> int:
    """The status with which a server on the loopback interface answers GET; 0 when it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def run_tool(command: Sequence[str | Path], *, seconds: float = 300) -> str:
    """Runs a tool to its end and returns its standard output; raises `StartError` when it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(f"{words[0]}: {error}") from error
    if done.returncode != 0:
        raise StartError(f"{' '.join(words)}: exit {done.returncode}: {' '.join(done.stderr.split())[-500:]}")
    return done.stdout


def succeeds(command: Sequence[str | Path]) -> bool:
    """Whether a tool ends with success; what it prints is not looked at."""
    try:
        run_tool(command, seconds=60)
    except StartError:
        return False
    return True


def fail(error: StartError) -> int:
    """Prints the error for a command's user; returns the command's exit code."""
    print(error, file=sys.stderr)
    return 1


def _poll(ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(0.05)
    return ready()


def _runs(process: Mapping[str, int]) -> bool:
    # A process id is used again in time; with the moment of its start it is not.
    return process["started"] != 0 and _started(process["pid"]) == process["started"]


def _ended(process: Mapping[str, int]) -> bool:
    return not _runs(process)


def _started(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
