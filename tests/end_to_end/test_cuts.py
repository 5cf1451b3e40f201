"""Networks that are cut and heal: between nodes, and between a job and its storage. Hosts are network namespaces."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterweight.pipeline.artifact import DOCUMENT, verify
from tests.networks import Network, can_make_networks, moto_on, network
from tests.nodes import HEAD, nodes, two_workers
from tests.patience import PATIENCE
from tests.pipeline.tiny import Run, files_of, job_of, lengthened, local_path, run_local, until, write_job

pytestmark = pytest.mark.end_to_end

BUCKET = "counterweight-cuts"


@pytest.fixture
def hosts() -> Iterator[Network]:
    if not can_make_networks():
        pytest.skip("nobody but root may make networks here")
    with network(3) as made:
        yield made


HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "4000"}
"""Of a node, by which Ray tells five times that it does not answer; its own words are 3 and 10 seconds."""

DECLARED_DEAD = 30.0
"""Seconds after which Ray has given up a node that does not answer."""


def test_a_node_that_is_cut_off_is_done_without_and_changes_nothing_when_the_network_heals(
    hosts: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a job runs, and when the node was given up. It goes on working on what others do by now, and reaches the job's
    storage all the time."""
    for name, value in {"RAY_AUTH_MODE": "disabled", **HEALTH}.items():
        monkeypatch.setenv(name, value)
    manifest = lengthened(write_job(tmp_path, layers=4))
    expected = files_of(local_path(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'expected'}")).uri))
    with nodes(hosts) as cluster:
        for number in (HEAD, 1, 2):
            cluster.start(number)
        address = ["--address", cluster.head, *two_workers()]
        published = []
        for output in ("healed-in-time", "given-up"):
            run = Run(manifest, "--output", str(tmp_path / output), *address, within=hosts.on(HEAD))
            try:
                run.wait_for("block 0 started", seconds=2 * PATIENCE)
                hosts.cut(2)
                cut = time.monotonic()
                if not published:
                    run.wait_for("block 2 started", seconds=2 * PATIENCE)
                    hosts.heal(2)
                code, out, err = run.finish(seconds=2 * PATIENCE)
            finally:
                if run.process.poll() is None:
                    run.kill()
            assert code == 0, err
            published.append(out.strip())
        time.sleep(max(0.0, DECLARED_DEAD - (time.monotonic() - cut)))
        hosts.heal(2)
        until(lambda: cluster.ended(2))
    for uri in published:
        place = local_path(uri)
        assert files_of(place) == expected
        assert [path.parent for path in place.parent.glob(f"*/{DOCUMENT}")] == [place]
        assert verify(uri)


def test_storage_that_is_cut_off_is_waited_for(hosts: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_job(tmp_path, layers=2)
    expected = files_of(local_path(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'expected'}")).uri))
    with moto_on(hosts, 1, BUCKET) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        run = Run(manifest, "--output", f"s3://{BUCKET}/out", within=hosts.on(HEAD))
        try:
            run.wait_for("block 0 started")
            hosts.cut(1)
            time.sleep(35)  # longer than a request waits for an answer
            hosts.heal(1)
            code, out, err = run.finish(seconds=2 * PATIENCE)
        finally:
            if run.process.poll() is None:
                run.kill()
        assert code == 0, err
        pulled = tmp_path / "pulled"
        pull = [*hosts.on(HEAD), sys.executable, "-m", "counterweight.pipeline.cli", "pull", out.strip(), str(pulled)]
        subprocess.run(pull, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    assert files_of(pulled) == expected
