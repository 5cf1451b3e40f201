"""Faults of every kind, each at a moment that a seed chooses, and what has to be true afterwards.

A drill runs a job and disturbs it. The job ends with the bytes of the undisturbed one; or in an error of its own, exit code 4,
in one line, and then the next run, which nobody disturbs, ends with these bytes. Nothing half written is left, and no process.
Most drills have their workers in this process; those of processes run the command on an embedded Ray.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from errno import ENOSPC
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from counterweight.pipeline.artifact import DOCUMENT, verify
from counterweight.pipeline.prune import prune
from counterweight.pipeline.reaper import descendants
from counterweight.workers.errors import CounterweightError
from counterweight.workers.storage import open_store
from counterweight.workers.storage.probe import PROBES
from counterweight.workers.storage.s3_client import S3Settings
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import PRUNES
from tests.faultproxy import Fault, FaultProxy, reserved_port
from tests.faults.strikes import MOMENTS, STRIKES, Strike, reached
from tests.patience import PATIENCE
from tests.pipeline.tiny import (
    Death,
    LocalPool,
    Run,
    alive,
    files_of,
    job_of,
    local_path,
    run_local,
    stored,
    until,
    write_job,
)
from tests.servers import S3Server, kill_ceph, start_ceph

BUCKET = "counterweight-faults"

SAME = "same bytes"

VARIANTS = {
    "original": ("spec.calibration.propagate=original",),
    "compressed": ("spec.calibration.propagate=compressed",),
    "rotated": ("spec.recipe.transforms=[{kind: rotation}]", "spec.recipe.activations={bits: 8}"),
}

STAYS = 100_000
"""Requests that meet a fault that does not go away by itself."""

REQUEST_FAULTS = {
    "refused with 503": (Fault.UNAVAILABLE, ("GET", "PUT", "HEAD")),
    "connection reset": (Fault.RESET, ("GET", "PUT", "HEAD")),
    "acknowledgement lost": (Fault.LOST_REPLY, ("PUT",)),
    "body cut off": (Fault.TRUNCATED, ("GET",)),
    "bit turned": (Fault.FLIPPED, ("GET",)),
    "slow": (Fault.SLOW, ("GET", "PUT")),
}

Drill = Callable[[Random], str]
"""Does it once; how the disturbed job ended, for the count. AssertionError when something is not as it should be."""


class Faults:
    """kinds: name -> drill. server: an object storage with a bucket `BUCKET`. ceph: where its data are, when it is one that can
    be killed. Everything is made below `root`."""

    def __init__(self, root: Path, server: S3Server, ceph: Path | None = None) -> None:
        self._root, self._server, self._ceph = root, server, ceph
        self._manifest = write_job(root / "job", layers=2)
        self._expected = cache(self._undisturbed)
        self._calls: dict[str, int] = {}
        self._requests: dict[str, list[str]] = {}
        self.local: dict[str, Drill] = {
            "worker dies before its work": partial(self._death, Death.BEFORE),
            "worker dies behind its commit": partial(self._death, Death.AFTER),
            "disk full": self._disk_full,
            "storage away": self._away,
        } | {name: partial(self._requests_fail, *one) for name, one in REQUEST_FAULTS.items()}
        if ceph is not None:
            self.local["storage killed and restarted"] = self._restarted
        self.processes: dict[str, Drill] = {name: partial(self._process, strike) for name, strike in STRIKES.items()}

    @property
    def kinds(self) -> dict[str, Drill]:
        return self.local | self.processes

    def _undisturbed(self, variant: str) -> dict[str, bytes]:
        """The artifact's bytes; counts the calls and the requests of such a job on the way."""
        pool = LocalPool(2)
        published = run_local(self._job(variant, (self._root / "expected").as_uri()), pool)
        self._calls[variant] = len(pool.calls)
        with FaultProxy(self._server.endpoint) as proxy, self._led_to(proxy) as uri:
            run_local(self._job(variant, uri), LocalPool(2))
            self._requests[variant] = [request.partition(" ")[0] for request in proxy.requests]
        return files_of(local_path(published.uri))

    def _job(self, variant: str, output: str) -> Any:
        return job_of(self._manifest, f"spec.output.uri={output}", *VARIANTS[variant])

    # -- workers in this process ------------------------------------------------------------------------------------

    def _death(self, when: Death, draw: Random) -> str:
        variant = draw.choice(list(VARIANTS))
        self._expected(variant)
        doomed = {draw.randrange(self._calls[variant]) for _ in range(draw.choice((1, 1, 2, 3)))}
        calls = iter(range(STAYS))

        def fault(worker: int, task: Task[Any]) -> Death | None:
            return when if next(calls) in doomed else None

        with self._directory() as output:
            return self._ends(variant, output, LocalPool(draw.choice((1, 2)), fault=fault))

    def _disk_full(self, draw: Random) -> str:
        """The disk refuses to flush, from some flush on, as it does when it is full."""
        variant = draw.choice(list(VARIANTS))
        self._expected(variant)
        free, flush = draw.randrange(120), os.fsync
        flushes = iter(range(STAYS))

        def fsync(descriptor: int) -> None:
            if next(flushes) >= free:
                raise OSError(ENOSPC, os.strerror(ENOSPC))
            flush(descriptor)

        with self._directory() as output:
            full = mock.patch.object(os, "fsync", fsync)
            return self._ends(variant, output, LocalPool(draw.choice((1, 2))), disturbed=full)

    def _requests_fail(self, fault: Fault, methods: tuple[str, ...], draw: Random) -> str:
        variant = draw.choice(list(VARIANTS))
        self._expected(variant)
        method = draw.choice(methods)
        skipped = draw.randrange(self._requests[variant].count(method))
        times = draw.choice((1, 2, 3, STAYS))
        if fault is Fault.SLOW:
            times = min(times, 3)
        with FaultProxy(self._server.endpoint) as proxy, self._led_to(proxy) as output:
            proxy.inject(fault, method, times=times, skipped=skipped)
            # What stays is met by every try: a test need not wait for many.
            hasty = partial(S3Settings, total_max_attempts=2, outage_seconds=0.5)
            impatient = mock.patch("counterweight.workers.storage.s3.S3Settings", hasty)
            pool = LocalPool(draw.choice((1, 2)))
            disturbed = impatient if times == STAYS else nullcontext()
            return self._ends(variant, output, pool, disturbed=disturbed, healed=proxy.reset)

    def _away(self, draw: Random) -> str:
        """Nobody listens for some seconds."""
        variant = draw.choice(list(VARIANTS))
        self._expected(variant)
        wait_for, seconds = draw.randrange(len(self._requests[variant])), draw.uniform(0.5, 4)
        listening, ended, back, over = (threading.Event() for _ in range(4))

        def absence(port: int) -> None:
            with FaultProxy(self._server.endpoint, port) as proxy:
                listening.set()
                while len(proxy.requests) < wait_for and not ended.wait(0.01):
                    pass
            time.sleep(seconds)
            with FaultProxy(self._server.endpoint, port):
                back.set()
                over.wait(PATIENCE)

        def healed() -> None:
            ended.set()
            back.wait(PATIENCE)

        with reserved_port() as port:
            thread = threading.Thread(target=absence, args=(port,))
            thread.start()
            try:
                assert listening.wait(PATIENCE)
                with self._led_to(f"http://127.0.0.1:{port}") as output:
                    return self._ends(variant, output, LocalPool(draw.choice((1, 2))), healed=healed)
            finally:
                ended.set()
                over.set()
                thread.join()

    def _restarted(self, draw: Random) -> str:
        """The storage is killed, as a power cut would, and started again at once."""
        variant = draw.choice(list(VARIANTS))
        self._expected(variant)
        assert self._ceph is not None
        directory, wait_for = self._ceph, draw.randrange(len(self._requests[variant]))
        with FaultProxy(self._server.endpoint) as proxy, self._led_to(proxy) as output:
            over = threading.Event()

            def cut() -> None:
                while len(proxy.requests) < wait_for and not over.wait(0.01):
                    pass
                kill_ceph(directory)
                start_ceph(directory)

            thread = threading.Thread(target=cut)
            thread.start()
            try:
                return self._ends(variant, output, LocalPool(2), healed=thread.join)
            finally:
                over.set()
                thread.join()

    def _ends(
        self,
        variant: str,
        output: str,
        pool: LocalPool,
        *,
        disturbed: AbstractContextManager[object] | None = None,
        healed: Callable[[], object] = lambda: None,
    ) -> str:
        """Runs the disturbed job, and once more when it ended in an error; what is true afterwards."""
        job, problem = self._job(variant, output), None
        with disturbed or nullcontext():
            try:
                published = run_local(job, pool)
            except CounterweightError as error:
                problem = error
        healed()
        if problem is not None:
            assert (problem.exit_code, len(str(problem).splitlines())) == (4, 1), problem
            published = run_local(job)
        assert stored(published.uri) == self._expected(variant), "other bytes"
        self._clean(output, published.uri)
        return SAME if problem is None else f"exit {problem.exit_code}, then {SAME}"

    # -- processes --------------------------------------------------------------------------------------------------

    def _process(self, strike: Strike, draw: Random) -> str:
        variant = draw.choice(list(VARIANTS))
        self._expected(variant)
        with self._directory() as output:
            settings = ["--output", output, "--set", "spec.resources={workers: 2, cpus_per_worker: 1}"]
            for override in VARIANTS[variant]:
                settings += ["--set", override]
            run = Run(self._manifest, *settings)
            below: list[int] = []
            expected: tuple[int, ...] = (0,)
            try:
                if reached(run, draw.choice(MOMENTS)):
                    time.sleep(draw.choice((0.0, draw.uniform(0, 1))))
                    below = [pid for pid, _ in descendants(run.process.pid)]
                    expected = strike(run, draw)
                code, out, err = run.finish()
            finally:
                if run.process.poll() is None:
                    run.kill()
            assert code in (0, *expected), (code, err)
            assert "Traceback" not in err, err
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(errors) == (code == 4), err
            assert (len(out.splitlines()) == 1) == (code == 0), out
            until(lambda: not any(map(alive, below)))
            published = run_local(self._job(variant, output))  # from what is there
            assert stored(published.uri) == self._expected(variant), "other bytes"
            if code >= 0:
                assert not [info for info in open_store(output).list(f"{PROBES}/") if info.key.endswith("/seen")]
            self._clean(output, published.uri, killed=expected != (0,))
            return SAME if code == 0 else f"exit {code}, then {SAME}"

    # -- places -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _directory(self) -> Iterator[str]:
        """A URI of its own, of a directory that is gone afterwards."""
        place = self._root / uuid.uuid4().hex
        try:
            yield place.as_uri()
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @contextmanager
    def _led_to(self, proxy: FaultProxy | str) -> Iterator[str]:
        """A URI of its own on the object storage, to which every new client is led by way of a proxy."""
        endpoint = proxy if isinstance(proxy, str) else proxy.endpoint
        with mock.patch.dict(os.environ, self._server.behind(endpoint).environment()):
            yield f"s3://{BUCKET}/{uuid.uuid4().hex}"

    def _clean(self, output: str, artifact: str, *, killed: bool = False) -> None:
        """Nothing half written, no list of a prune, one artifact, which is whole and stays. killed: what a killed process was
        writing is left until a prune."""
        store = open_store(output)
        assert killed or not list(store.stale_writes(timedelta(0))), "unfinished writes"
        prune(output, timedelta(0))
        assert not list(store.stale_writes(timedelta(0))), "unfinished writes behind a prune"
        assert not list(store.list(f"{PRUNES}/"))
        documents = [info.key for info in store.list() if info.key.rpartition("/")[2] == DOCUMENT]
        assert [store.uri_of(key).removesuffix(f"/{DOCUMENT}") for key in documents] == [artifact]
        verify(artifact)
