"""A whole job on object storage: the artifact that a directory gets, whatever the requests meet on their way."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import DOCUMENT, Published, pull, verify
from counterweight.pipeline.evaluate import evaluate_artifact
from counterweight.pipeline.manifest import load_manifest
from counterweight.workers.errors import StorageError
from counterweight.workers.storage import open_store
from counterweight.workers.storage.s3_client import S3Settings
from counterweight.workers.tasks.task import Task
from tests.faultproxy import Fault, FaultProxy
from tests.pipeline.tiny import Death, LocalPool, files_of, job_of, local_path, run_local, stored, write_job
from tests.servers import S3Server, ceph_server, moto_server

BUCKET = "counterweight-end-to-end"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def expected(manifest: Path) -> Published:
    """What the job makes of itself in a directory."""
    return run_local(job_of(manifest))


@pytest.fixture(scope="module", params=["moto", pytest.param("ceph", marks=pytest.mark.integration)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    started = moto_server() if request.param == "moto" else ceph_server(tmp_path_factory.mktemp("ceph"))
    with started as server:
        yield server.with_bucket(BUCKET)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[S3Server], str]:
    """Leads every new client to a server; returns a fresh root URI there."""

    def connect_to(server: S3Server) -> str:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    return connect_to


def test_s3_and_a_directory_get_the_same_artifact(
    server: S3Server, connect: Callable[[S3Server], str], manifest: Path, expected: Published, tmp_path: Path
) -> None:
    root = connect(server)
    published = run_local(job_of(manifest, f"spec.output.uri={root}"), LocalPool(2))
    assert published.uri == f"{root}/tiny/{expected.document.id}"
    assert stored(published.uri) == files_of(local_path(expected.uri))
    assert verify(f"{root}/tiny").id == expected.document.id
    pull(published.uri, tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(local_path(expected.uri))
    assert verify((tmp_path / "pulled").as_uri()) == published.document
    assert evaluate_artifact(published.uri)["text"].compensated == expected.document.compensated
    again = run_local(job_of(manifest, f"spec.output.uri={root}"))
    assert again.existing
    blobs = [info.key for info in open_store(root).list("_work/blobs/")]
    assert len(blobs) == len(list((manifest.parent / "out" / "_work" / "blobs").iterdir()))


def test_model_texts_and_manifest_may_lie_there_too(
    server: S3Server, connect: Callable[[S3Server], str], manifest: Path, expected: Published
) -> None:
    root = connect(server)
    store = open_store(root)
    for path in manifest.parent.rglob("*"):
        if path.is_file() and "out" not in path.relative_to(manifest.parent).parts:
            store.write(path.relative_to(manifest.parent).as_posix(), path.read_bytes())
    published = run_local(load_manifest(f"{root}/job.yaml").job)
    assert published.uri == f"{root}/out/tiny/{expected.document.id}"
    assert stored(published.uri) == files_of(local_path(expected.uri))


def test_a_worker_that_dies_leaves_no_trace_there_either(
    server: S3Server, connect: Callable[[S3Server], str], manifest: Path, expected: Published
) -> None:
    root, seen = connect(server), set()

    def fault(worker: int, task: Task[Any]) -> Death | None:
        first = task.kind not in seen
        seen.add(task.kind)
        return Death.AFTER if first else None

    published = run_local(job_of(manifest, f"spec.output.uri={root}"), LocalPool(2, fault=fault))
    assert stored(published.uri) == files_of(local_path(expected.uri))


# -- requests that meet something on their way ----------------------------------------------------------------------

STORMS: dict[str, list[tuple[Fault, str, str]]] = {
    "slow down": [(Fault.UNAVAILABLE, "PUT", ""), (Fault.UNAVAILABLE, "GET", ""), (Fault.UNAVAILABLE, "HEAD", "")],
    "connections reset": [(Fault.RESET, "PUT", ""), (Fault.RESET, "GET", "")],
    "bodies that end early": [(Fault.TRUNCATED, "GET", "_work/blobs"), (Fault.TRUNCATED, "GET", "model-")],
    "bits that turn": [(Fault.FLIPPED, "GET", "_work/blobs")],
    "acknowledgements lost": [(Fault.LOST_REPLY, "PUT", "_work/commits"), (Fault.LOST_REPLY, "PUT", DOCUMENT)],
    "writers that meet": [(Fault.CONFLICT, "PUT", "_work/commits"), (Fault.CONFLICT, "PUT", DOCUMENT)],
}


@pytest.mark.parametrize("storm", STORMS)
def test_bad_weather_leaves_no_trace(
    server: S3Server, connect: Callable[[S3Server], str], manifest: Path, expected: Published, storm: str
) -> None:
    with FaultProxy(server.endpoint) as proxy:
        root = connect(server.behind(proxy.endpoint))
        for fault, method, containing in STORMS[storm]:
            proxy.inject(fault, method, times=2, containing=containing)
        published = run_local(job_of(manifest, f"spec.output.uri={root}"))
        assert stored(published.uri) == files_of(local_path(expected.uri))
        assert verify(published.uri).id == expected.document.id
        # Every fault that was ordered has happened.
        assert [rule.remaining for rule in proxy._rules] == [0] * len(STORMS[storm])


def test_storage_that_stays_away_ends_the_job_and_the_next_run_goes_on(
    server: S3Server,
    connect: Callable[[S3Server], str],
    manifest: Path,
    expected: Published,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Less patience than the five tries of a request that are usual.
    monkeypatch.setattr("counterweight.workers.storage.s3.S3Settings", partial(S3Settings, total_max_attempts=1))
    with FaultProxy(server.endpoint) as proxy:
        root = connect(server.behind(proxy.endpoint))
        proxy.inject(Fault.UNAVAILABLE, "PUT", times=10_000, containing="_work/commits/block")
        with pytest.raises(StorageError, match=r"^block \d \(block\) after 3 tries: create s3://.*SlowDown"):
            run_local(job_of(manifest, f"spec.output.uri={root}"))
        assert not [info for info in open_store(root).list() if info.key.endswith(DOCUMENT)]
        proxy.reset()
        published = run_local(job_of(manifest, f"spec.output.uri={root}"))
        assert stored(published.uri) == files_of(local_path(expected.uri))
