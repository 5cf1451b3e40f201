"""What all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import HTTPConnection

from counterweight.pipeline.jobs.schedule import Schedules
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.service.readiness import Readiness
from counterweight.pipeline.service.roots import Roots
from counterweight.pipeline.service.throttle import Throttle
from counterweight.pipeline.service.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Service:
    """pause: sleeps for so many seconds, between two looks of a stream."""

    jobs: JobStore
    tokens: Tokens
    roots: Roots
    throttle: Throttle = field(default_factory=Throttle)
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    readiness: Readiness = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "readiness", Readiness(self.jobs))

    @property
    def schedules(self) -> Schedules:
        """Those of the store, read anew: an instance that lives for months remembers none."""
        return Schedules(self.jobs)


def service_of(request: HTTPConnection) -> Service:
    """The service that a request is to."""
    return cast(Service, request.app.state.service)
