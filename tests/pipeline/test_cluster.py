"""The embedded cluster: when it does not start, and who can reach it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterweight.pipeline.cluster import cluster
from counterweight.pipeline.pool import PoolSize
from counterweight.pipeline.reaper import descendants
from tests.pipeline.tiny import Run, write_job

LISTENS = "0A"
"""State of a socket in /proc/net/tcp."""


def listening(pids: set[int]) -> set[str]:
    """Addresses at which processes accept connections."""
    inodes = set()
    for pid in pids:
        for descriptor in (Path("/proc") / str(pid) / "fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:"):
                inodes.add(target[len("socket:[") : -1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and fields[9] in inodes:
                found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(digits: str) -> str:
    """Of the words in host byte order that the kernel prints."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


@pytest.fixture(scope="module")
def processes() -> Iterator[set[int]]:
    """This one and those of its cluster."""
    with cluster(None, PoolSize(workers=1, cpus=1, gpus=0.0)):
        yield {os.getpid(), *(pid for pid, _ in descendants(os.getpid()))}


def test_no_other_machine_reaches_it(processes: set[int]) -> None:
    found = listening(processes)
    assert len(processes) > 3
    assert found
    assert {a for a in found if not a.startswith("127.") and a not in ("::1", "::ffff:127.0.0.1")} == set()


def test_a_secret_that_is_in_no_file_is_asked_for(processes: set[int]) -> None:
    daemons = [pid for pid in processes if "/gcs_server" in (Path("/proc") / str(pid) / "cmdline").read_text()]
    assert len(daemons) == 1
    variables = (Path("/proc") / str(daemons[0]) / "environ").read_text().split("\0")
    values = dict(variable.partition("=")[::2] for variable in variables)
    assert values["RAY_AUTH_MODE"] == "token"
    assert len(values["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ, "others that this process starts are not told"


@pytest.mark.end_to_end
def test_a_ray_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    code, out, err = Run(write_job(tmp_path, layers=1)).finish()
    assert (code, out) == (4, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Ray did not start on this machine in 2 attempts: ")
    assert "Traceback" not in err
