"""Asks a store, before a job depends on it, for the promises on which coordination rests.

Servers that speak S3 differ in just these: some ignore `If-None-Match`, some look first and write
afterwards, so that of several writers more than one is told that it won. Such a server loses committed
work, silently and rarely.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from counterweight.workers.errors import CounterweightError, ObjectNotFoundError, RequestError
from counterweight.workers.storage.base import ObjectStore

PROBES = ".counterweight-probe"
"""What probes write lies below it; only one that was killed leaves something."""

RACERS = 8
RACES = 5
# A racer's record is padded: a server that looks first and writes afterwards is open to others for as long
# as it receives the body. Of 40 races at Swift 2.38, 9 had a single winner with records of 16 bytes, and 4
# with these; all 30 probes refused it.
_RECORD_BYTES = 64 << 10


def probe(store: ObjectStore) -> None:
    """Checks, with real objects under a fresh prefix that are deleted again, that the store

    - refuses to create an object twice, and keeps the first;
    - lets exactly one of 8 concurrent creators win, 5 times in a row, and keeps the winner's bytes;
    - reads and lists what was just written, replaced and deleted.

    Raises `RequestError` beginning with "refused:" when it does not, and `StorageError` when the store
    cannot be reached. Passing is no proof: it bounds how often a weak server goes unnoticed.
    """
    prefix = f"{PROBES}/{uuid.uuid4().hex}"
    keys = [f"{prefix}/once", *(f"{prefix}/race-{number}" for number in range(RACES)), f"{prefix}/plain"]
    try:
        _create_once(store, keys[0])
        with ThreadPoolExecutor(RACERS, "probe") as threads:
            for key in keys[1:-1]:
                _race(store, key, threads)
        _read_and_list(store, prefix, keys)
    finally:
        # What the checks found is the news; that deleting works was one of them.
        with contextlib.suppress(CounterweightError):
            for key in keys:
                store.delete(key)


def _create_once(store: ObjectStore, key: str) -> None:
    if not store.create(key, b"first"):
        raise _refused(store, "creating an object under a fresh key reported that the key was taken")
    if store.create(key, b"second"):
        raise _refused(store, "creating an object twice succeeded twice (the server ignores If-None-Match)")
    if store.read(key) != b"first":
        raise _refused(store, "a refused creation replaced the object")


def _race(store: ObjectStore, key: str, threads: ThreadPoolExecutor) -> None:
    start = threading.Barrier(RACERS)
    records = [bytes([number]) * _RECORD_BYTES for number in range(RACERS)]

    def enter(record: bytes) -> bool:
        start.wait()
        return store.create(key, record)

    won = [record for record, wins in zip(records, threads.map(enter, records), strict=True) if wins]
    if len(won) != 1:
        raise _refused(store, f"{len(won)} of {RACERS} concurrent creators of one object were told that they won")
    if store.read(key) != won[0]:
        raise _refused(store, "the object does not hold what the winner of a race wrote")


def _read_and_list(store: ObjectStore, prefix: str, keys: list[str]) -> None:
    plain = keys[-1]
    for data in (b"one", b"two, longer"):
        store.write(plain, data)
        if store.read(plain) != data:
            raise _refused(store, "a read after a write returned something else")
    listed = [item.key for item in store.list(f"{prefix}/")]
    if listed != sorted(keys):
        raise _refused(store, f"a listing after writing {len(keys)} objects did not show them in order: {listed}")
    store.delete(plain)
    if plain in (item.key for item in store.list(f"{prefix}/")):
        raise _refused(store, "a listing showed a deleted object")
    try:
        store.read(plain)
    except ObjectNotFoundError:
        return
    raise _refused(store, "a deleted object could still be read")


def _refused(store: ObjectStore, what: str) -> RequestError:
    return RequestError(
        f"refused: {store.uri}: {what}: expected storage with atomic creation (PUT If-None-Match: *) and "
        "strong read-after-write and list-after-write consistency"
    )
