"""An object store in memory with a clock that tests move, and jobs in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from counterweight.pipeline.jobs.record import BatchPart, JobRecord, record_of
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.manifest import CompressionJob, parse_manifest
from counterweight.workers.errors import ObjectNotFoundError
from counterweight.workers.storage import ObjectInfo, ObjectStore, StaleWrite, Writer

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class MemoryStore(ObjectStore):
    """As strict as a real one about what is created once; as fast as a dictionary."""

    uri = "file:///memory"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self.time = EPOCH
        self._lock = threading.Lock()

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if key in self.objects:
                return False
            self.objects[key] = (bytes(data), self.time)
            return True

    def write(self, key: str, data: bytes | bytearray | memoryview) -> None:
        with self._lock:
            self.objects[key] = (bytes(data), self.time)

    def _read(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectNotFoundError(f"read {key}: no such object")
        return self.objects[key][0]

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._read(key)[start : start + length]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            found = sorted(item for item in self.objects.items() if item[0].startswith(prefix))
        for key, (data, at) in found:
            yield ObjectInfo(key=key, size=len(data), modified=at)

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def now(self) -> datetime:
        return self.time

    def size(self, key: str) -> int:
        return len(self._read(key))

    def exists(self, key: str) -> bool:
        return key in self.objects

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def below(self, key: str) -> ObjectStore:
        raise NotImplementedError

    def stream(self, key: str, *, start: int = 0, chunk: int = 0) -> Iterator[bytes]:
        raise NotImplementedError

    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Writer:
        raise NotImplementedError

    def copy(self, source_key: str, key: str) -> None:
        raise NotImplementedError

    def touch(self, key: str, older_than: timedelta) -> bool:
        raise NotImplementedError

    def stale_writes(self, older_than: timedelta) -> Iterator[StaleWrite]:
        raise NotImplementedError

    def abort_write(self, stale: StaleWrite) -> bool:
        raise NotImplementedError


def manifest(name: str = "tiny", **changes: object) -> CompressionJob:
    """A job of that name; changes: `spec.calibration.seed=1` as `spec_calibration_seed=1`, for example."""
    document = f"""\
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {{name: {name}}}
spec:
  model: {{uri: model}}
  calibration: {{source: {{uri: calibration.txt}}, sequences: 12, sequence_length: 32}}
  recipe: {{weights: {{bits: 4, group_size: 32}}, compensation: {{kind: svd, rank: {{count: 4}}}}}}
  output: {{uri: out}}
"""
    overrides = [f"{path.replace('__', '.')}={value}" for path, value in changes.items()]
    return parse_manifest(document, name="job.yaml", base="file:///jobs", overrides=overrides).job


def record(
    name: str = "tiny", *, priority: int = 0, tenant: str = "default", batch: BatchPart | None = None
) -> JobRecord:
    return record_of(manifest(name), priority=priority, tenant=tenant, batch=batch)


def submitted(jobs: JobStore, *names: str) -> list[str]:
    """Ids of jobs that are submitted now."""
    records = [record(name) for name in names]
    assert all(jobs.submit(one) for one in records)
    return [one.id for one in records]
