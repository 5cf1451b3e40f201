"""The embedded cluster: when it does not start, and who can reach it."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from counterweight.pipeline import cluster
from counterweight.pipeline.cluster import ATTEMPTS
from counterweight.pipeline.pool import PoolSize
from counterweight.pipeline.reaper import descendants
from tests.pipeline.tiny import Run, lengthened, write_job

LISTENS = "0A"
"""State of a socket in /proc/net/tcp."""


def test_the_object_store_of_several_workers_is_bound_by_half_of_the_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs(cluster.SHARED_MEMORY)
    half = max(128 << 20, free.f_bavail * free.f_frsize // 2)
    several, one = PoolSize(workers=2, cpus=1, gpus=0.0), PoolSize(workers=1, cpus=1, gpus=0.0)
    assert cluster.store_bytes(several) == pytest.approx(half, rel=0.2), "others use that memory, too"
    assert cluster.store_bytes(one) == 128 << 20
    monkeypatch.setattr(cluster, "SHARED_MEMORY", tmp_path / "none")
    assert cluster.store_bytes(several) == 128 << 20


def listening(pids: set[int]) -> set[str]:
    """Addresses at which processes accept connections."""
    inodes = set[str]()
    for pid in pids:
        for descriptor in (Path("/proc") / str(pid) / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                target = os.readlink(descriptor)
                inodes |= {target[len("socket:[") : -1]} if target.startswith("socket:") else set()
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
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[int]]:
    """A driver and its cluster, in processes of their own: here somebody may have imported Ray before."""
    run = Run(lengthened(write_job(tmp_path_factory.mktemp("job"), layers=1)), "--address", "local")
    try:
        run.wait_for("stage blocks")
        os.kill(run.process.pid, signal.SIGSTOP)  # or the job might be over before it was looked at
        yield {run.process.pid, *(pid for pid, _ in descendants(run.process.pid))}
    finally:
        if run.process.poll() is None:
            run.kill()


@pytest.mark.end_to_end
def test_no_other_machine_reaches_it(processes: set[int]) -> None:
    found = listening(processes)
    assert found
    assert {a for a in found if not a.startswith("127.") and a not in ("::1", "::ffff:127.0.0.1")} == set()


@pytest.mark.end_to_end
def test_a_secret_that_is_in_no_file_is_asked_for(processes: set[int]) -> None:
    (daemon,) = [pid for pid in processes if "/gcs_server" in (Path("/proc") / str(pid) / "cmdline").read_text()]
    variables = (Path("/proc") / str(daemon) / "environ").read_text().split("\0")
    values = dict(variable.partition("=")[::2] for variable in variables)
    assert values["RAY_AUTH_MODE"] == "token"
    assert len(values["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.end_to_end
def test_a_ray_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    code, out, err = Run(write_job(tmp_path, layers=1), "--address", "local").finish()
    assert (code, out) == (4, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: Ray did not start on this machine in {ATTEMPTS} attempts: ")
    assert "Traceback" not in err
