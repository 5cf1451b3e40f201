"""A driver that stands by: it takes jobs, says what it has, fires schedules, and shows what its runs do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from counterweight.pipeline.jobs.attempt import Starter
from counterweight.pipeline.jobs.drive import Driver, Enough, holder_name
from counterweight.pipeline.jobs.drivers import Announcer, gpus_here
from counterweight.pipeline.jobs.schedule import Schedules
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.place import LOCAL, NONE
from counterweight.workers.errors import RequestError, SurroundingsError


def stand_by(
    jobs: JobStore, start: Starter, say: Callable[[str], None], *, enough: Enough, gpus: int | None, fires: bool
) -> None:
    """Drives jobs until it is enough. gpus: see `devices`; fires: whether it fires the store's schedules."""
    announcer = Announcer(jobs, holder_name(), gpus)
    schedules = Schedules(jobs) if fires else None

    def note(text: str) -> None:
        announcer.said = text
        say(text)

    def meanwhile() -> None:
        announcer.tick()
        if schedules is not None:
            schedules.tick()

    say(f"drives the jobs of {jobs.store.uri}")
    try:
        Driver(jobs, start, note, meanwhile=meanwhile, gpus=gpus, holder=announcer.holder).work(enough)
    finally:
        with suppress(SurroundingsError):
            announcer.close()


def devices(address: str | None, gpus: int | None) -> int | None:
    """GPUs of a machine that jobs can have: of this one, as it was said or as many as there are; None where jobs have their
    workers on a cluster that runs. address: as of `run`."""
    if address not in (None, NONE, LOCAL):
        return None
    return gpus_here() if gpus is None else gpus


def measured(start: Starter, place: str) -> Starter:
    """The same, with metrics of the runs that are served at HOST:PORT. RequestError."""
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RequestError(f"--metrics {place[:100]!r}: expected HOST:PORT, such as 0.0.0.0:9090")
    try:
        from prometheus_client import start_http_server

        from counterweight.pipeline.observability.driver_metrics import DriverMetrics
    except ImportError as error:
        raise RequestError(
            f"--metrics: no module {error.name}: expected pip install 'counterweight[observability]'"
        ) from error
    metrics = DriverMetrics(start)
    try:
        start_http_server(int(port), host, metrics.registry)
    except OSError as error:
        raise RequestError(f"--metrics {place}: {error.strerror or error}") from error
    return metrics.start
