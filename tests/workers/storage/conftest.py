"""Stores to test against: a directory, moto, a real Ceph gateway, and a proxy that breaks requests before
each.

Making a client costs a tenth of a second, so the stores of a session share one per server and settings.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from counterweight.workers.storage import ObjectStore, open_store
from counterweight.workers.storage.s3 import S3Store
from counterweight.workers.storage.s3_client import S3Settings
from tests.faultproxy import FaultProxy
from tests.servers import Connect, S3Server, ceph_server, moto_server, swift_server

BUCKET = "counterweight-tests"
PART = 5 << 20  # the least that S3 allows: what takes several parts is then quickly written


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server.with_bucket(BUCKET)


@pytest.fixture(scope="session")
def ceph_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ceph")


@pytest.fixture(scope="session")
def ceph(ceph_directory: Path) -> Iterator[S3Server]:
    with ceph_server(ceph_directory) as server:
        yield server.with_bucket(BUCKET)


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        yield server.with_bucket(BUCKET)


@pytest.fixture(scope="session")
def roots() -> Callable[[S3Server, S3Settings], S3Store]:
    """Makes the store of a server's whole bucket, once per settings."""

    @functools.cache
    def open_root(server: S3Server, settings: S3Settings) -> S3Store:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            root = S3Store(f"s3://{BUCKET}", settings)
            root._connection.client()  # made while the environment leads to the server
        return root

    return open_root


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Leads this test's new clients to a server; returns a fresh root URI there."""

    def connect_to(server: S3Server) -> str:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    return connect_to


@pytest.fixture(params=["file", "moto", pytest.param("ceph", marks=pytest.mark.integration)])
def store(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    connect: Connect,
    roots: Callable[[S3Server, S3Settings], S3Store],
) -> ObjectStore:
    """An empty store of each kind."""
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    server: S3Server = request.getfixturevalue(request.param)
    connect(server)
    return roots(server, S3Settings(part_size=PART)).below(uuid.uuid4().hex)


@pytest.fixture(scope="session", params=["moto", pytest.param("ceph", marks=pytest.mark.integration)])
def _proxy(request: pytest.FixtureRequest) -> Iterator[tuple[FaultProxy, S3Server]]:
    server: S3Server = request.getfixturevalue(request.param)
    with FaultProxy(server.endpoint) as proxy:
        yield proxy, server.behind(proxy.endpoint)


@pytest.fixture
def proxied(
    _proxy: tuple[FaultProxy, S3Server], roots: Callable[[S3Server, S3Settings], S3Store]
) -> tuple[FaultProxy, Callable[..., S3Store]]:
    """A proxy in front of each S3 server, and a maker of stores (of one fresh prefix) that go through it."""
    proxy, server = _proxy
    prefix = uuid.uuid4().hex

    def make(settings: S3Settings | None = None) -> S3Store:
        return roots(server, settings or S3Settings()).below(prefix)

    proxy.reset()
    return proxy, make
