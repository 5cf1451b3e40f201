"""Faults whose jobs have their workers in this process, each at a moment that a seed chooses.

A drill runs a job and disturbs it. The job ends with the bytes of the undisturbed one; or in an error of its own, exit code 4,
in one line, and then the next run, which nobody disturbs, ends with these bytes. Nothing half written is left.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from errno import ENOSPC
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from counterweight.workers.errors import CounterweightError
from counterweight.workers.storage.s3_client import S3Settings
from counterweight.workers.tasks.task import Task
from tests.disks import can_mount, small_disk
from tests.faultproxy import Fault, FaultProxy, reserved_port
from tests.faults.site import NOTHING, SAME, Drill, Site
from tests.faults.strikes import STAYS
from tests.faults.variants import VARIANTS
from tests.patience import PATIENCE
from tests.pipeline.tiny import Death, LocalPool, run_local
from tests.servers import kill_ceph, start_ceph

REQUEST_FAULTS = {
    "refused with 503": (Fault.UNAVAILABLE, ("GET", "PUT", "HEAD")),
    "connection reset": (Fault.RESET, ("GET", "PUT", "HEAD")),
    "acknowledgement lost": (Fault.LOST_REPLY, ("PUT",)),
    "body cut off": (Fault.TRUNCATED, ("GET",)),
    "bit turned": (Fault.FLIPPED, ("GET",)),
    "slow": (Fault.SLOW, ("GET", "PUT")),
}


class Drills:
    """kinds: name -> drill. ceph: where the data of the object storage are, when it is one that can be killed."""

    def __init__(self, site: Site, ceph: Path | None = None) -> None:
        self._site, self._ceph = site, ceph
        self.kinds: dict[str, Drill] = {
            "worker dies before its work": partial(self._death, Death.BEFORE),
            "worker dies behind its commit": partial(self._death, Death.AFTER),
            "disk full": self._disk_full,
            "storage away": self._away,
        } | {name: partial(self._requests_fail, *one) for name, one in REQUEST_FAULTS.items()}
        if can_mount():
            self.kinds["small disk"] = self._small_disk
        if ceph is not None:
            self.kinds["storage killed and restarted"] = self._restarted

    def _death(self, when: Death, draw: Random) -> str:
        variant = draw.choice(list(VARIANTS))
        plain = self._site.undisturbed(variant)
        doomed = {draw.randrange(plain.calls) for _ in range(draw.choice((1, 1, 2, 3)))}
        calls = iter(range(STAYS))

        def fault(worker: int, task: Task[Any]) -> Death | None:
            return when if next(calls) in doomed else None

        pool = LocalPool(draw.choice((1, 2)), fault=fault)
        with self._site.directory() as output:
            return self._ends(variant, output, pool, happened=lambda: bool(pool.restarts))

    def _disk_full(self, draw: Random) -> str:
        """The disk refuses to flush, from some flush on, as it does when it is full."""
        variant = draw.choice(list(VARIANTS))
        plain = self._site.undisturbed(variant)
        free, flush = draw.randrange(plain.flushes), os.fsync
        flushes = iter(range(STAYS))

        def fsync(descriptor: int) -> None:
            if next(flushes) >= free:
                raise OSError(ENOSPC, os.strerror(ENOSPC))
            flush(descriptor)

        with self._site.directory() as output:
            full, pool = mock.patch.object(os, "fsync", fsync), LocalPool(draw.choice((1, 2)))
            return self._ends(variant, output, pool, disturbed=full, happened=lambda: next(flushes) > free)

    def _small_disk(self, draw: Random) -> str:
        """A disk that is too small for the job, and grows when it has ended."""
        variant = draw.choice(list(VARIANTS))
        plain = self._site.undisturbed(variant)
        size = int(plain.written * draw.uniform(0.02, 1))
        with small_disk(self._site.root / uuid.uuid4().hex, size) as disk:
            output, pool = disk.place.as_uri(), LocalPool(draw.choice((1, 2)))
            return self._ends(
                variant, output, pool, healed=lambda: disk.resize(1 << 30), happened=lambda: False, named=output
            )

    def _requests_fail(self, fault: Fault, methods: tuple[str, ...], draw: Random) -> str:
        variant = draw.choice(list(VARIANTS))
        plain = self._site.undisturbed(variant)
        method = draw.choice(methods)
        skipped = draw.randrange(plain.requests.count(method))
        times = draw.choice((1, 2, 3, STAYS))
        if fault is Fault.SLOW:
            times = min(times, 3)
        with FaultProxy(self._site.server.endpoint) as proxy, self._site.led_to(proxy) as output:
            proxy.inject(fault, method, times=times, skipped=skipped)
            # What stays is met by every try: a test need not wait for many.
            hasty = partial(S3Settings, total_max_attempts=2, outage_seconds=0.5)
            impatient = mock.patch("counterweight.workers.storage.s3.S3Settings", hasty)
            pool = LocalPool(draw.choice((1, 2)))
            disturbed = impatient if times == STAYS else nullcontext()
            return self._ends(
                variant, output, pool, disturbed=disturbed, healed=proxy.reset, happened=lambda: proxy.broken > 0
            )

    def _away(self, draw: Random) -> str:
        """Nobody listens for some seconds."""
        variant = draw.choice(list(VARIANTS))
        plain = self._site.undisturbed(variant)
        wait_for, seconds = draw.randrange(len(plain.requests)), draw.uniform(0.5, 4)
        listening, ended, back, over = (threading.Event() for _ in range(4))

        def absence(port: int) -> None:
            with FaultProxy(self._site.server.endpoint, port) as proxy:
                listening.set()
                while len(proxy.requests) < wait_for and not ended.wait(0.01):
                    pass
            time.sleep(seconds)
            with FaultProxy(self._site.server.endpoint, port):
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
                with self._site.led_to(f"http://127.0.0.1:{port}") as output:
                    return self._ends(variant, output, LocalPool(draw.choice((1, 2))), healed=healed)
            finally:
                ended.set()
                over.set()
                thread.join()

    def _restarted(self, draw: Random) -> str:
        """The storage is killed, as a power cut would, and started again at once."""
        variant = draw.choice(list(VARIANTS))
        plain = self._site.undisturbed(variant)
        assert self._ceph is not None
        directory, wait_for = self._ceph, draw.randrange(len(plain.requests))
        with FaultProxy(self._site.server.endpoint) as proxy, self._site.led_to(proxy) as output:
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
        happened: Callable[[], bool] = lambda: True,
        named: str = "",
    ) -> str:
        """Runs the disturbed job, and once more when it ended in an error; what is true afterwards. happened: whether the
        fault came before the end. named: what an error has to name."""
        job, problem = self._site.job(variant, output), None
        with disturbed or nullcontext():
            try:
                published = run_local(job, pool)
            except CounterweightError as error:
                problem = error
        came = problem is not None or happened()
        healed()
        if problem is not None:
            assert named in str(problem), problem
            assert (problem.exit_code, len(str(problem).splitlines())) == (4, 1), problem
            published = run_local(job)
        self._site.check(variant, output, published.uri)
        if not came:
            return NOTHING
        return SAME if problem is None else f"exit {problem.exit_code}, then {SAME}"
