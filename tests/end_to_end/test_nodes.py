"""A job on a cluster of two nodes that runs already: real raylets of this machine, of which one is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.pipeline.held_block import HeldBlock, shards_of
from tests.pipeline.tiny import Run, files_of, job_of, local_path, run_local, until, write_job

pytestmark = pytest.mark.end_to_end

STARTS = 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Nodes:
    """Ray nodes as process groups, on addresses of the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._groups = folder, dict[int, subprocess.Popen[bytes]]()
        self.head = ""

    def start(self, number: int) -> None:
        """The node on 127.0.0.<number> with one CPU; number 2 is the head, without any. A node that does not come up is started
        again: its ports were free when they were chosen, and may be somebody else's by now."""
        for _ in range(STARTS):
            if number == 2:
                self.head = f"127.0.0.2:{free_port()}"
            process = self._started(number)
            until(lambda: "Ray runtime started" in self.log(number) or process.poll() is not None)  # noqa: B023
            if process.poll() is None:
                return
        raise AssertionError(f"node {number} did not start {STARTS} times: {self.log(number)}")

    def _started(self, number: int) -> subprocess.Popen[bytes]:
        port = self.head.rpartition(":")[2]
        role = (
            ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
            if number == 2
            else [f"--address={self.head}", "--num-cpus=1"]
        )
        command = [
            *(Path(sys.executable).with_name("ray").as_posix(), "start", *role, f"--node-ip-address=127.0.0.{number}"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--num-gpus=0"),
            *("--object-store-memory=100000000", "--disable-usage-stats", "--block"),
            *([f"--temp-dir={self._folder}"] if number == 2 else []),
        ]
        log = (self._folder / f"node-{number}.log").open("wb")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._groups[number] = process
        return process

    def log(self, number: int) -> str:
        return (self._folder / f"node-{number}.log").read_text()

    def kill(self, number: int) -> None:
        """With everything that runs on it."""
        os.killpg(self._groups.pop(number).pid, signal.SIGKILL)

    def stop(self) -> None:
        for process in self._groups.values():
            with contextlib.suppress(ProcessLookupError):  # one that did not start
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._groups.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = Path(tempfile.mkdtemp(prefix="cw-"))  # of sockets, whose paths must be short
    nodes = Nodes(folder)
    yield nodes
    nodes.stop()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_is_lost_for_good_costs_its_share_and_nothing_else(nodes: Nodes, tmp_path: Path) -> None:
    manifest = write_job(tmp_path, layers=4)
    text = manifest.read_text().replace("sequences: 12, sequence_length: 32", "sequences: 512, sequence_length: 32")
    words = (tmp_path / "calibration.txt").read_text()
    (tmp_path / "calibration.txt").write_text(" ".join([words] * 40))
    manifest.write_text(text)
    expected = files_of(local_path(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'expected'}")).uri))
    held = [HeldBlock(tmp_path / "out", shard) for shard in shards_of(tmp_path / "expected")[:2]]
    for number in (2, 3, 4):
        nodes.start(number)
    two = ["--set", "spec.resources={workers: 2, cpus_per_worker: 1}"]
    run = Run(manifest, "--address", nodes.head, *two)
    try:
        run.wait_until(lambda: all(block.reached() for block in held), seconds=2 * PATIENCE)  # on each node a worker
        nodes.kill(4)
        for block in held:
            block.release()
        code, out, err = run.finish(seconds=2 * PATIENCE)
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, err
    assert ": try 1 of 3 failed: worker " in err
    assert files_of(local_path(out.strip())) == expected


def test_a_worker_that_is_larger_than_every_node_is_not_waited_for_for_ever(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERWEIGHT_START_SECONDS", "10")
    manifest = write_job(tmp_path, layers=1)
    for number in (2, 3):
        nodes.start(number)
    run = Run(manifest, "--address", nodes.head, "--set", "spec.resources={workers: 1, cpus_per_worker: 2}")
    code, out, err = run.finish()
    assert (code, out) == (4, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "none of 1 workers has answered" in line
    assert "each asks for 2 CPU; nodes have" in line
