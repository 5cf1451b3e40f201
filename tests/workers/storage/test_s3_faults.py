"""Faults on the wire between us and S3: each ends in the same bytes, or in a clear error; never in wrong
bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import pytest

from counterweight.workers.errors import IntegrityError, StorageError
from counterweight.workers.storage import fetch, sha256_hex
from counterweight.workers.storage.s3 import S3Store
from counterweight.workers.storage.s3_client import S3Settings
from tests.faultproxy import Fault, FaultProxy
from tests.pipeline.tiny import until
from tests.servers import Connect, S3Server

MIB = 1 << 20
PIECE = 128 << 10
DATA = random.Random(0).randbytes(6 * PIECE)
DIGEST = sha256_hex(DATA)
BIG = random.Random(1).randbytes(6 * MIB)  # two parts
PATIENT = S3Settings(part_size=5 * MIB)
# A stall is noticed after a second here, where it takes 30 in earnest. A server that is merely slow stalls too, so requests
# cannot be counted then.
IMPATIENT = S3Settings(read_timeout=1.0, part_size=5 * MIB)

Proxied = tuple[FaultProxy, Callable[[S3Settings], S3Store]]


@pytest.fixture
def proxy(proxied: Proxied) -> FaultProxy:
    return proxied[0]


@pytest.fixture
def store(proxied: Proxied) -> S3Store:
    store = proxied[1](PATIENT)
    store.write("a", DATA)
    return store


@pytest.fixture
def impatient(proxied: Proxied, store: S3Store) -> S3Store:
    """The same, with less patience."""
    return proxied[1](IMPATIENT)


def test_a_body_that_breaks_off_is_resumed(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.TRUNCATED, "GET", times=2)
    assert b"".join(store.stream("a", chunk=PIECE)) == DATA
    assert proxy.count("GET") == 3
    proxy.inject(Fault.TRUNCATED, "GET", times=1)
    assert store.read_range("a", PIECE, 4 * PIECE) == DATA[PIECE : 5 * PIECE]
    proxy.inject(Fault.TRUNCATED, "GET", times=1)
    assert b"".join(store.stream("a", start=2 * PIECE, chunk=PIECE)) == DATA[2 * PIECE :]
    assert proxy.count("GET") == 7


def test_a_body_that_stalls_is_resumed(proxy: FaultProxy, impatient: S3Store) -> None:
    for read, expected in (
        (lambda: b"".join(impatient.stream("a", chunk=PIECE)), DATA),
        (lambda: impatient.read_range("a", PIECE, 4 * PIECE), DATA[PIECE : 5 * PIECE]),
        (lambda: b"".join(impatient.stream("a", start=2 * PIECE, chunk=PIECE)), DATA[2 * PIECE :]),
    ):
        proxy.reset()
        proxy.inject(Fault.STALLED, "GET", times=1)
        assert read() == expected
        assert proxy.count("GET") >= 2


def test_no_byte_is_sent_twice_on_resumption(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.TRUNCATED, "GET", times=1)
    assert b"".join(store.stream("a", chunk=PIECE)) == DATA
    assert proxy.ranges == [None, f"bytes={3 * PIECE}-"]


def test_a_body_that_breaks_off_again_and_again_is_an_error(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.TRUNCATED, "GET", times=10)
    with pytest.raises(StorageError, match=r"read s3://.*/a: broke off at byte \d+ of 786432, resumed 3 times"):
        store.read("a")
    assert proxy.count("GET") == 4


def test_an_object_replaced_during_a_resumption_is_an_error(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.TRUNCATED, "GET", times=1)
    stream = store.stream("a", chunk=PIECE)
    next(stream)
    store.write("a", DATA[::-1])
    with pytest.raises(StorageError, match="replaced while it was read"):
        list(stream)


def test_a_server_that_ignores_ranges_is_an_error(
    moto: S3Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = connect(moto)
    with FaultProxy(moto.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = S3Store(uri)
        store.write("a", DATA)
        proxy.inject(Fault.WHOLE, "GET", times=3)
        reads: list[Callable[[], object]] = [
            lambda: store.read_range("a", 1, 10),
            lambda: store.read_range("a", 0, 10),
            lambda: list(store.stream("a", start=1)),
        ]
        for read in reads:
            with pytest.raises(StorageError, match="the server ignored the range"):
                read()


def test_a_flipped_bit_is_found_and_read_again(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.FLIPPED, "GET", times=1)
    assert store.read("a", sha256=DIGEST) == DATA
    assert proxy.count("GET") == 2


def test_a_bit_that_stays_flipped_is_an_integrity_error(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.FLIPPED, "GET", times=2)
    with pytest.raises(IntegrityError, match=r"read s3://.*/a"):
        store.read("a", sha256=DIGEST)


@pytest.mark.parametrize("fault", [Fault.TRUNCATED, Fault.STALLED, Fault.FLIPPED, Fault.RESET])
def test_fetch_mends_what_it_can(
    proxy: FaultProxy, store: S3Store, impatient: S3Store, tmp_path: Path, fault: Fault
) -> None:
    proxy.inject(fault, "GET", times=1)
    fetch(impatient if fault is Fault.STALLED else store, "a", tmp_path / "a", size=len(DATA), sha256=DIGEST)
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("GET", Fault.UNAVAILABLE),
        ("PUT", Fault.RESET),
        pytest.param("GET", Fault.RESET, marks=pytest.mark.integration),
        pytest.param("HEAD", Fault.UNAVAILABLE, marks=pytest.mark.integration),
        pytest.param("HEAD", Fault.RESET, marks=pytest.mark.integration),
        pytest.param("PUT", Fault.UNAVAILABLE, marks=pytest.mark.integration),
        pytest.param("DELETE", Fault.UNAVAILABLE, marks=pytest.mark.integration),
        pytest.param("DELETE", Fault.RESET, marks=pytest.mark.integration),
    ],
)
def test_requests_that_fail_twice_are_repeated(proxy: FaultProxy, store: S3Store, method: str, fault: Fault) -> None:
    before = proxy.count(method)
    proxy.inject(fault, method, times=2)
    if method == "GET":
        assert store.read("a") == DATA
    elif method == "HEAD":
        assert store.size("a") == len(DATA)
    elif method == "PUT":
        store.write("b", b"data")
        assert store.read("b") == b"data"
    else:
        store.delete("a")
        assert not store.exists("a")
    assert proxy.count(method) - before == 3


@pytest.mark.integration
def test_a_server_that_stays_unavailable_is_given_up(proxied: Proxied) -> None:
    proxy, make = proxied
    proxy.inject(Fault.UNAVAILABLE, "PUT", times=100)
    for attempts in (1, 3):
        before = proxy.count("PUT")
        with pytest.raises(StorageError, match=r"write s3://.*/b: 503 SlowDown"):
            make(S3Settings(total_max_attempts=attempts)).write("b", b"data")
        assert proxy.count("PUT") - before == attempts


def test_a_lost_acknowledgement_of_a_creation_is_resolved_as_won(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.LOST_REPLY, "PUT", times=1)
    assert store.create("record", b"mine")
    assert proxy.count("PUT", "/record") == 2  # boto3 asked again, and was told 412
    assert not store.create("record", b"mine")
    assert store.read("record") == b"mine"


@pytest.mark.integration
def test_a_creation_whose_every_acknowledgement_is_lost_is_won(proxied: Proxied) -> None:
    proxy, make = proxied
    store = make(S3Settings(total_max_attempts=2))
    proxy.inject(Fault.LOST_REPLY, "PUT", times=2)
    assert store.create("b", b"mine")
    proxy.inject(Fault.LOST_REPLY, "PUT", times=2)
    assert not store.create("b", b"other")
    assert store.read("b") == b"mine"


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.UNAVAILABLE])
def test_a_creation_that_never_reached_the_server_is_an_error(proxied: Proxied, fault: Fault) -> None:
    proxy, make = proxied
    store = make(S3Settings(total_max_attempts=2))
    proxy.inject(fault, "PUT", times=2)
    with pytest.raises(StorageError, match=r"create s3://.*/b: "):
        store.create("b", b"mine")
    assert not store.exists("b")
    assert store.create("b", b"mine")


def test_conflicting_creators_try_again(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.CONFLICT, "PUT", times=2)
    assert store.create("b", b"mine")
    assert store.read("b") == b"mine"
    proxy.inject(Fault.CONFLICT, "PUT", times=1)
    assert not store.create("b", b"other")


@pytest.mark.integration
def test_conflicts_without_end_are_an_error(proxy: FaultProxy, store: S3Store) -> None:
    proxy.inject(Fault.CONFLICT, "PUT", times=100)
    before = proxy.count("PUT")
    with pytest.raises(StorageError, match=r"create s3://.*/b: conflicting writers 5 times"):
        store.create("b", b"mine")
    assert proxy.count("PUT") - before == 5, "boto3 repeats them too"


BEGIN, SECOND, COMPLETE = ("POST", "?uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId=")


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (SECOND, Fault.RESET),
        (COMPLETE, Fault.LOST_REPLY),
        pytest.param(BEGIN, Fault.UNAVAILABLE, marks=pytest.mark.integration),
        pytest.param(BEGIN, Fault.RESET, marks=pytest.mark.integration),
        pytest.param(SECOND, Fault.UNAVAILABLE, marks=pytest.mark.integration),
        pytest.param(SECOND, Fault.LOST_REPLY, marks=pytest.mark.integration),
        pytest.param(COMPLETE, Fault.UNAVAILABLE, marks=pytest.mark.integration),
        pytest.param(COMPLETE, Fault.RESET, marks=pytest.mark.integration),
    ],
)
def test_a_multipart_upload_survives(
    proxy: FaultProxy, store: S3Store, request_: tuple[str, str], fault: Fault
) -> None:
    method, containing = request_
    proxy.inject(fault, method, times=1, containing=containing)
    with store.open_writer("b") as writer:
        writer.write(BIG)
        assert writer.commit().sha256 == sha256_hex(BIG)
    assert store.read("b", sha256=sha256_hex(BIG)) == BIG


def test_a_lost_acknowledgement_of_a_whole_upload_is_resolved(proxied: Proxied) -> None:
    proxy, make = proxied
    store = make(S3Settings(part_size=5 * MIB, total_max_attempts=1))
    proxy.inject(Fault.LOST_REPLY, "POST", times=1, containing="uploadId=")
    store.write("b", BIG)
    assert store.read("b", sha256=sha256_hex(BIG)) == BIG


@pytest.mark.integration
def test_an_abort_waits_for_the_parts_under_way(proxied: Proxied, store: S3Store) -> None:
    """A part that arrives after the abort would stay in the bucket, invisible and paid for."""
    proxy, make = proxied
    proxy.hold_until(2, "PUT", containing="partNumber=")  # there is one
    writer = make(S3Settings(part_size=5 * MIB)).open_writer("b")
    writer.write(BIG)
    until(lambda: proxy.held == 1)
    with ThreadPoolExecutor(1) as threads:
        aborting = threads.submit(writer.abort)
        wait([aborting], timeout=0.3)  # in which one that does not wait is through
        assert proxy.count("DELETE") == 0
        proxy.let_go()
        aborting.result()
    assert proxy.held == 0
    assert proxy.requests[-1].startswith("DELETE ")
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 0


def test_a_lost_begin_of_an_upload_is_swept(proxy: FaultProxy, store: S3Store) -> None:
    """The server opened an upload of which we never learned; a second one carries the object."""
    proxy.inject(Fault.LOST_REPLY, "POST", times=1, containing="?uploads")
    store.write("b", BIG)
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 1
    assert store.read("b", sha256=sha256_hex(BIG)) == BIG


@pytest.mark.parametrize(
    ("method", "containing"), [("PUT", "partNumber=1"), ("POST", "uploadId=")], ids=["part", "complete"]
)
def test_an_upload_that_fails_for_good_leaves_nothing(
    proxied: Proxied, store: S3Store, method: str, containing: str
) -> None:
    proxy, make = proxied
    proxy.inject(Fault.UNAVAILABLE, method, times=2, containing=containing)
    with pytest.raises(StorageError, match=r"write .*s3://.*/b: 503"):
        make(S3Settings(part_size=5 * MIB, total_max_attempts=2)).write("b", BIG)
    assert not store.exists("b")
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 0


def test_the_first_error_is_told_when_the_abort_fails_too(proxied: Proxied, store: S3Store) -> None:
    proxy, make = proxied
    proxy.inject(Fault.UNAVAILABLE, "DELETE", times=1)
    writer = make(S3Settings(part_size=5 * MIB, total_max_attempts=1)).open_writer("b")
    writer.write(BIG)
    own = KeyError("the caller's own")
    writer.__exit__(KeyError, own, None)
    assert "abort writing" in own.__notes__[0]
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 1
    assert not store.exists("b")


@pytest.mark.integration
def test_a_listing_survives(proxy: FaultProxy, store: S3Store) -> None:
    store.write("b", b"")
    proxy.inject(Fault.RESET, "GET", times=1)
    proxy.inject(Fault.UNAVAILABLE, "GET", times=1)
    assert [item.key for item in store.list()] == ["a", "b"]
