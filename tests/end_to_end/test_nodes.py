"""A job on a cluster of several nodes that runs already: nodes that die, of other code, too small, that come later."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import counterweight
from tests.nodes import HEAD, Nodes, nodes, two_workers
from tests.patience import PATIENCE
from tests.pipeline.held_block import HeldBlock, shards_of
from tests.pipeline.tiny import Run, files_of, job_of, lengthened, local_path, run_local, write_job

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with nodes() as made:
        yield made


def test_a_node_that_is_lost_for_good_costs_its_share_and_nothing_else(cluster: Nodes, tmp_path: Path) -> None:
    manifest = lengthened(write_job(tmp_path, layers=4))
    expected = files_of(local_path(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'expected'}")).uri))
    held = [HeldBlock(tmp_path / "out", shard) for shard in shards_of(tmp_path / "expected")[:2]]
    for number in (HEAD, 1, 2):
        cluster.start(number)
    run = Run(manifest, "--address", cluster.head, *two_workers())
    try:
        run.wait_until(lambda: all(block.reached() for block in held), seconds=2 * PATIENCE)  # on each node a worker
        cluster.kill(2)
        run.wait_for(": try 1 of 3 failed: worker ", seconds=2 * PATIENCE)  # before its worker could end the block
        for block in held:
            block.release()
        code, out, err = run.finish(seconds=2 * PATIENCE)
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, err
    assert files_of(local_path(out.strip())) == expected


def test_a_cluster_of_other_code_and_of_small_nodes_that_grows(
    cluster: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster for three jobs, for what it costs to start one."""
    manifest = write_job(tmp_path, layers=2)
    cluster.start(HEAD)
    cluster.start(1)
    with monkeypatch.context() as environment:
        environment.setenv("PYTHONPATH", str(other_mathematics(tmp_path / "other")))
        cluster.start(2)
    nodes_compute_with_the_drivers_code(cluster, manifest)
    too_large = ("--address", cluster.head, "--set", "spec.resources={workers: 1, cpus_per_worker: 2}")
    with monkeypatch.context() as environment:
        environment.setenv("COUNTERWEIGHT_START_SECONDS", "10")
        a_worker_larger_than_every_node_is_told_and_not_waited_for_for_ever(manifest, too_large)
    a_cluster_that_grows_is_given_the_time_to(cluster, manifest, too_large)


def other_mathematics(place: Path) -> Path:
    """Our package, of the same version, with code that no node may run: its bits would differ, and nothing would say so."""
    shutil.copytree(Path(counterweight.__file__).parent, place / "counterweight", symlinks=False)
    rounding = place / "counterweight" / "workers" / "quantization" / "grid.py"
    rounding.write_text(rounding.read_text() + "\n\nraise ImportError('of the other code')\n")
    return place


def nodes_compute_with_the_drivers_code(cluster: Nodes, manifest: Path) -> None:
    """Whatever they have installed."""
    expected = run_local(job_of(manifest, f"spec.output.uri={manifest.parent / 'expected'}"))
    code, out, err = Run(manifest, "--address", cluster.head, *two_workers()).finish(seconds=2 * PATIENCE)
    assert code == 0, err
    assert files_of(local_path(out.strip())) == files_of(local_path(expected.uri))


def a_worker_larger_than_every_node_is_told_and_not_waited_for_for_ever(manifest: Path, asked: Sequence[str]) -> None:
    """At once, and in the end again."""
    code, out, err = Run(manifest, "--output", str(manifest.parent / "too-large"), *asked).finish()
    assert (code, out) == (4, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "none of 1 workers has answered" in line
    assert "each asks for 2 CPU; nodes have" in line
    assert "note: the cluster has room for 0 of 1 workers: each asks for 2 CPU; nodes have" in err


def a_cluster_that_grows_is_given_the_time_to(cluster: Nodes, manifest: Path, asked: Sequence[str]) -> None:
    """As an autoscaler does it: the node comes when somebody waits for it."""
    run = Run(manifest, "--output", str(manifest.parent / "grown"), *asked)
    try:
        run.wait_for("the cluster has room for 0 of 1 workers", seconds=2 * PATIENCE)
        cluster.start(3, cpus=2)
        code, out, err = run.finish(seconds=2 * PATIENCE)
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, err
    assert len(out.splitlines()) == 1
