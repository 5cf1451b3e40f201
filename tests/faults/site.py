"""Where drills take place: a job, what it makes undisturbed, places for its outputs, and what has to be true afterwards."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from random import Random
from unittest import mock

from counterweight.pipeline.artifact import DOCUMENT, verify
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.prune import prune
from counterweight.workers.storage import open_store
from counterweight.workers.workspace import PRUNES
from tests.faultproxy import FaultProxy
from tests.faults.variants import VARIANTS
from tests.pipeline.tiny import LocalPool, files_of, job_of, local_path, run_local, stored, write_job
from tests.servers import S3Server

BUCKET = "counterweight-faults"

SAME = "same bytes"

NOTHING = "nothing happened"
"""The job was over before its fault, which is no injection."""

Drill = Callable[[Random], str]
"""Does it once; how the disturbed job ended, for the count. AssertionError when something is not as it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """A job that nobody disturbs. files: of its artifact. calls: to workers. flushes: to a disk. written: bytes that it leaves.
    requests: the method of each that it sends to an object storage, in order."""

    files: dict[str, bytes]
    calls: int
    flushes: int
    written: int
    requests: list[str]


class Site:
    """server: an object storage with a bucket `BUCKET`. Everything is made below `root`."""

    def __init__(self, root: Path, server: S3Server) -> None:
        self.root, self.server = root, server
        self.manifest = write_job(root / "job", layers=2)
        self.undisturbed = cache(self._undisturbed)

    def _undisturbed(self, variant: str) -> Undisturbed:
        pool, output = LocalPool(2), self.root / "expected" / variant
        with mock.patch.object(os, "fsync", wraps=os.fsync) as flush:
            published = run_local(self.job(variant, output.as_uri()), pool)
        with FaultProxy(self.server.endpoint) as proxy, self.led_to(proxy) as uri:
            run_local(self.job(variant, uri), LocalPool(2))
            requests = [request.partition(" ")[0] for request in proxy.requests]
        return Undisturbed(
            files=files_of(local_path(published.uri)),
            calls=len(pool.calls),
            flushes=flush.call_count,
            written=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
            requests=requests,
        )

    def job(self, variant: str, output: str) -> CompressionJob:
        return job_of(self.manifest, f"spec.output.uri={output}", *VARIANTS[variant])

    @contextmanager
    def directory(self) -> Iterator[str]:
        """A URI of its own, of a directory that is gone afterwards."""
        place = self.root / uuid.uuid4().hex
        try:
            yield place.as_uri()
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @contextmanager
    def led_to(self, proxy: FaultProxy | str) -> Iterator[str]:
        """A URI of its own on the object storage, to which every new client is led by way of a proxy."""
        endpoint = proxy if isinstance(proxy, str) else proxy.endpoint
        with mock.patch.dict(os.environ, self.server.behind(endpoint).environment()):
            yield f"s3://{BUCKET}/{uuid.uuid4().hex}"

    def check(self, variant: str, output: str, artifact: str, *, killed: bool = False) -> None:
        """The bytes of the undisturbed job, nothing half written, no list of a prune, nothing that a prune does not know, one
        artifact, which is whole and stays. killed: what a killed process was writing is left until a prune."""
        assert stored(artifact) == self.undisturbed(variant).files, "other bytes"
        store = open_store(output)
        assert killed or not list(store.stale_writes(timedelta(0))), "unfinished writes"
        pruned = prune(output, timedelta(0))
        assert not pruned.left, f"nobody knows what they are: {pruned.left}"
        assert not list(store.stale_writes(timedelta(0))), "unfinished writes behind a prune"
        assert not list(store.list(f"{PRUNES}/"))
        documents = [info.key for info in store.list() if info.key.rpartition("/")[2] == DOCUMENT]
        assert [store.uri_of(key).removesuffix(f"/{DOCUMENT}") for key in documents] == [artifact]
        verify(artifact)
