"""A server that is away: waited for within a patience, told once, and credentials that expire meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError, SSLError

from counterweight.workers.errors import ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage import open_store, outages
from counterweight.workers.storage.outages import OUTAGES, Patience
from counterweight.workers.storage.s3 import S3Store
from counterweight.workers.storage.s3_client import PATIENCE, S3Settings
from tests.faultproxy import Fault, FaultProxy, reserved_port
from tests.pipeline.tiny import until
from tests.servers import Connect, S3Server

Proxied = tuple[FaultProxy, Callable[[S3Settings], S3Store]]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the listener hears; pauses are short."""
    monkeypatch.setattr(outages, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(outages, "LONGEST_PAUSE_SECONDS", 0.1)
    heard: list[str] = []
    monkeypatch.setattr(OUTAGES, "listener", heard.append)
    yield heard
    OUTAGES._waiting.clear()


LONG = 800.0
"""Seconds that no server here is away for."""


def patient(seconds: float) -> S3Settings:
    return S3Settings(total_max_attempts=1, outage_seconds=seconds, part_size=5 << 20)


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.RESET])
@pytest.mark.parametrize("operation", ["write", "read", "create", "list", "copy", "parts"])
def test_every_operation_waits_until_the_server_answers(
    proxied: Proxied, told: list[str], fault: Fault, operation: str
) -> None:
    proxy, make = proxied
    store = make(patient(LONG))
    store.write("a", b"data")
    for method in ("PUT", "GET", "POST", "HEAD"):
        proxy.inject(fault, method, times=8)
    if operation == "write":
        store.write("b", b"more")
    elif operation == "read":
        assert store.read("a") == b"data"
    elif operation == "create":
        assert store.create("b", b"mine")
    elif operation == "list":
        assert [info.key for info in store.list()] == ["a"]
    elif operation == "copy":
        store.copy("a", "b")
    else:
        store.write("b", bytes(11 << 20))
    assert len(told) >= 1
    assert all("is away (" in text and f"up to {LONG:.0f} s" in text for text in told)
    assert OUTAGES.now == "" or operation in ("copy", "parts")
    proxy.reset()
    assert store.exists("a")
    if operation in ("write", "create", "copy", "parts"):
        assert store.exists("b")


def test_patience_ends(proxied: Proxied, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a tenth of a second passes with each request."""
    proxy, make = proxied
    monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: 0.1 * proxy.count("PUT")))
    proxy.inject(Fault.UNAVAILABLE, "PUT", times=10_000)
    with pytest.raises(StorageError, match=r"write s3://.*: 503 SlowDown"):
        make(patient(0.45)).write("a", b"data")
    assert len(told) == 1
    assert proxy.count("PUT") == 6  # the first, and those of the 0.45 s behind it


def test_an_answer_is_final_however_large_the_patience(proxied: Proxied, told: list[str]) -> None:
    _, make = proxied
    store = make(patient(600))
    assert not store.exists("a")
    with pytest.raises(ObjectNotFoundError):
        store.read("a")
    assert told == []


def test_a_server_that_comes_back_is_found(moto: S3Server, connect: Connect, told: list[str]) -> None:
    """Nobody listens at first: the request is there before the server is."""
    answers: list[bytes] = []

    def work() -> None:
        store = S3Store(root, patient(LONG))
        store.write("a", b"data")
        answers.append(store.read("a"))

    with reserved_port() as port:
        root = connect(moto.behind(f"http://127.0.0.1:{port}"))
        thread = threading.Thread(target=work)
        thread.start()
        until(lambda: "EndpointConnectionError" in OUTAGES.now)
        with FaultProxy(moto.endpoint, port=port):
            thread.join(LONG)
    assert answers == [b"data"]
    assert len(told) == 1


def test_pauses_grow_to_a_bound_and_end_with_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(outages, "LONGEST_PAUSE_SECONDS", 15.0)
    clock = [100.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: clock[0])
    request: dict[str, Any] = {"url": "http://host:9/bucket/key?x", "context": {}}
    refused = EndpointConnectionError(endpoint_url="http://host:9")
    pauses = []
    while (pause := Patience(100)(None, refused, request)) is not None:
        pauses.append(pause)
        clock[0] += pause
    assert sum(pauses) == pytest.approx(100)
    for pause, longest in zip(pauses[:-1], [1, 2, 4, 8, *[15] * 20], strict=False):
        assert longest / 2 <= pause <= longest


def test_a_certificate_that_is_wrong_is_not_waited_for() -> None:
    request: dict[str, Any] = {"url": "https://host/bucket", "context": {}}
    assert Patience(100)(None, SSLError(endpoint_url="https://host", error="x"), request) is None


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(PATIENCE, text)
    with pytest.raises(RequestError, match=f"{PATIENCE}: '{text}': expected seconds"):
        open_store("s3://bucket/prefix")


def test_the_environment_says_how_patient_requests_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE, "12")
    assert S3Settings().outage_seconds == 12
    monkeypatch.delenv(PATIENCE)
    assert S3Settings().outage_seconds == 600


def test_credentials_that_expire_are_read_anew(
    moto: S3Server, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that something else keeps fresh: the client has signed with what stood there first."""
    with FaultProxy(moto.endpoint) as proxy:
        root = connect(moto.behind(proxy.endpoint))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        file = tmp_path / "credentials"
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

        def keys(number: int) -> str:
            return f"[default]\naws_access_key_id = KEY{number}\naws_secret_access_key = secret{number}\n"

        file.write_text(keys(1))
        store = S3Store(root, patient(0))
        store.write("a", b"data")
        file.write_text(keys(2))
        proxy.inject(Fault.EXPIRED, "GET", times=1)
        assert store.read("a") == b"data"
        assert [("KEY1" in text, "KEY2" in text) for text in proxy.signed[-2:]] == [(True, False), (False, True)]
        proxy.inject(Fault.EXPIRED, "GET", times=1)
        with pytest.raises(StorageError, match="ExpiredToken"):
            store.read("a")  # and nobody has renewed them
