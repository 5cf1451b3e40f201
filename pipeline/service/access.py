"""Who asks, and what is there for them: dependencies of the API's routes. Those that wait for nothing are coroutines: FastAPI
runs any other in a thread, which costs more than they do.

What belongs to another tenant is answered as what does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from counterweight.pipeline.jobs.batch import Batch, all_batches, get_batch
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.schedule import Schedule
from counterweight.pipeline.service.context import Service, service_of
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.tokens import Principal, Role
from counterweight.workers.errors import UnknownIdError

_BEARER = HTTPBearer(auto_error=False, description="A token of the service, of role viewer, submitter or admin.")


def admitted(request: Request, token: str | None) -> Principal:
    """Whose token it is. 401 for nobody's, 429 for who asks too often; a peer without a token has a bound of its own."""
    service = service_of(request)
    found = None if token is None else service.tokens.find(token)
    peer = request.client.host if request.client is not None else "unknown"
    seconds = service.throttle.wait(f"peer {peer}" if found is None else f"token {found.name}")
    if seconds:
        raise Refused(429, "too many requests", (), {"Retry-After": str(math.ceil(seconds))})
    if found is None:
        challenge = {"WWW-Authenticate": 'Bearer realm="counterweight"'}
        raise Refused(401, "expected a token of this service, as `Authorization: Bearer TOKEN`", (), challenge)
    return found


async def _service(request: Request) -> Service:
    return service_of(request)


async def _principal(
    request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Principal:
    single = len(request.headers.getlist("authorization")) == 1
    return admitted(request, bearer.credentials if bearer is not None and single else None)


def require(principal: Principal, role: Role) -> Principal:
    """403 for a token that may less."""
    if principal.role.rank < role.rank:
        raise Refused(403, f"token {principal.name} is of role {principal.role.value}: expected {role.value} or more")
    return principal


def _at_least(role: Role) -> Callable[[Principal], Awaitable[Principal]]:
    async def dependency(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
        return require(principal, role)

    return dependency


Monitor = Annotated[Principal, Depends(_at_least(Role.MONITOR))]
Viewer = Annotated[Principal, Depends(_at_least(Role.VIEWER))]
Submitter = Annotated[Principal, Depends(_at_least(Role.SUBMITTER))]
Context = Annotated[Service, Depends(_service)]


def tenant_for(principal: Principal, asked: str | None) -> str:
    """For whom something is submitted: the token's tenant, or, for an admin, whichever is asked for."""
    if asked is None:
        return principal.tenant
    if not principal.sees(asked):
        raise Refused(403, f"token {principal.name} is of tenant {principal.tenant}: expected that or none")
    return asked


def find_job(service: Service, principal: Principal, id: str) -> Job:
    """UnknownIdError."""
    job = service.jobs.get(id)
    if not principal.sees(job.record.tenant):
        raise UnknownIdError(id)
    return job


def visible_jobs(service: Service, principal: Principal) -> list[Job]:
    """First submitted first."""
    return [job for job in service.jobs.all() if principal.sees(job.record.tenant)]


def find_batch(service: Service, principal: Principal, id: str) -> Batch:
    """UnknownIdError."""
    batch = get_batch(service.jobs, id)
    if not _sees_all(principal, batch):
        raise UnknownIdError(id)
    return batch


def visible_batches(service: Service, principal: Principal) -> list[Batch]:
    """First submitted first."""
    return [batch for batch in all_batches(service.jobs) if _sees_all(principal, batch)]


def _sees_all(principal: Principal, batch: Batch) -> bool:
    return all(principal.sees(job.record.tenant) for job in batch.jobs)


def find_schedule(service: Service, principal: Principal, id: str) -> Schedule:
    """UnknownIdError."""
    schedule = service.schedules.get(id)
    if not principal.sees(schedule.record.tenant):
        raise UnknownIdError(id)
    return schedule


def visible_schedules(service: Service, principal: Principal) -> list[Schedule]:
    """By id."""
    return [schedule for schedule in service.schedules.all() if principal.sees(schedule.record.tenant)]
