"""`/metrics`, for Prometheus: the job store as its records have it, and the requests of this instance.

Prometheus' library is an extra, without which there are no metrics and the route says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from counterweight.pipeline.service.access import Context, Monitor
from counterweight.pipeline.service.problems import Refused

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

PREFIX = "/v1"

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Requests:
    """Of one instance."""

    registry: CollectorRegistry
    seconds: Histogram


def make_requests() -> Requests | None:
    """None without the library."""
    try:
        from prometheus_client import CollectorRegistry, Histogram
    except ImportError:
        return None
    registry = CollectorRegistry()
    name, text = (
        "counterweight_http_request_seconds",
        "Seconds until a request is answered, of streams until they begin.",
    )
    labels = ["method", "route", "status"]
    return Requests(registry, Histogram(name, text, labels, buckets=SECONDS, registry=registry))


class Measured:
    """Measures every request, by its route and not by its path, of which there are any number."""

    def __init__(self, app: ASGIApp, requests: Requests) -> None:
        self._app, self._seconds = app, requests.seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                method, route = _route(scope)
                self._seconds.labels(method, route, message["status"]).observe(time.perf_counter() - begun)
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)


def _route(scope: Scope) -> tuple[str, str]:
    """Method and route of a request; of one that has no route neither, because anything may be asked for."""
    path = getattr(scope.get("route"), "path", None)
    if path is None:
        return "any", "none"
    # A route that was included under a prefix knows only its own part.
    missing = scope["path"].startswith(f"{PREFIX}/") and not path.startswith(f"{PREFIX}/")
    return scope["method"], f"{PREFIX}{path}" if missing else path


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, service: Context, principal: Monitor) -> Response:
    """For a token of role monitor, or of whoever sees the jobs that are counted."""
    requests: Requests | None = getattr(request.app.state, "requests", None)
    if requests is None:
        raise Refused(501, "no metrics: expected pip install 'counterweight[observability]'")
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    from counterweight.pipeline.observability.store_metrics import StoreMetrics

    every = service.jobs.all()
    counted = [job for job in every if principal.counts(job.record.tenant)]
    registry = CollectorRegistry()
    registry.register(StoreMetrics(counted, every, service.jobs.limits()))
    text = generate_latest(registry) + generate_latest(requests.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
