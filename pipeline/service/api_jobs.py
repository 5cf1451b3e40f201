"""Routes about jobs."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Response

from counterweight.pipeline.jobs.batch import BATCH_ID
from counterweight.pipeline.jobs.drivers import drivers, obstacle_of
from counterweight.pipeline.jobs.facts import counts, facts, history
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.lease import NotAtEndError, cancel, delete
from counterweight.pipeline.jobs.record import HIGHEST_PRIORITY, JOB_ID, TENANT
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import queue_of
from counterweight.pipeline.service.access import (
    Context,
    Monitor,
    Submitter,
    Viewer,
    find_job,
    tenant_for,
    visible_jobs,
)
from counterweight.pipeline.service.bodies import ManifestBody, documented
from counterweight.pipeline.service.cursors import page
from counterweight.pipeline.service.models import DriverList, JobDetail, JobFacts, JobPage, QueueFacts
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.streams import END, EventSource, LogSource, place_in, streamed
from counterweight.pipeline.service.submission import Order, create_job
from counterweight.pipeline.service.tokens import Role

MANIFEST = {
    "type": "object",
    "description": "A CompressionJob with absolute URIs below the service's roots; `counterweight schema` prints its schema.",
    "required": ["apiVersion", "kind", "metadata", "spec"],
}
STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events."}
OVER = {"description": "There is nothing behind the last event."}

Id = Annotated[str, Path(pattern=f"^{JOB_ID}$", description="Id of a job.")]
Tenant = Annotated[str | None, Query(pattern=f"^{TENANT}$", description="For whom; an admin may name any.")]
Priority = Annotated[int, Query(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY, description="A step is worth an hour.")]
Again = Annotated[bool, Query(description="A further one, though it was submitted before.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,200}$",
        description="A manifest submitted twice is one job. With `again`, which asks for another, a repeated request with the "
        "same key finds the one that the first made.",
    ),
]
LastEvent = Annotated[str | None, Header(alias="Last-Event-ID", description="Of the last event that was received.")]

router = APIRouter(tags=["jobs"])


async def _order(
    principal: Submitter, tenant: Tenant = None, priority: Priority = 0, again: Again = False, key: Key = None
) -> Order:
    return Order(tenant_for(principal, tenant), priority, again, key)


Ordered = Annotated[Order, Depends(_order)]


def located(response: Response, place: str, *, created: bool) -> None:
    """Says where what was submitted is, and whether this request made it."""
    response.status_code = 201 if created else 200
    response.headers["Location"] = place


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobFacts,
    responses={200: {"model": JobFacts, "description": "It was submitted before."}},
    openapi_extra=documented(MANIFEST),
)
def submit_job(
    service: Context,
    principal: Submitter,
    body: ManifestBody,
    order: Ordered,
    response: Response,
) -> dict[str, object]:
    """Submit a manifest. The same manifest is the same job. Whoever drives jobs of the store will run it."""
    job, created = create_job(service, principal, body, order)
    located(response, f"/v1/jobs/{job.id}", created=created)
    return facts(job)


@router.get("/jobs", response_model=JobPage)
def list_jobs(
    service: Context,
    principal: Viewer,
    state: Annotated[State | None, Query(description="Only those in this state.")] = None,
    tenant: Tenant = None,
    batch: Annotated[str | None, Query(pattern=f"^{BATCH_ID}$", description="Only those of this batch.")] = None,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> dict[str, object]:
    """List jobs, last submitted first."""
    chosen = [
        job
        for job in visible_jobs(service, principal)
        if job.listed(state) and tenant in (None, job.record.tenant) and batch in (None, _batch(job))
    ]
    shown, following = page(chosen, cursor, limit)
    return {"jobs": [facts(job) for job in shown], "next": following}


def _batch(job: Job) -> str | None:
    return None if job.record.batch is None else job.record.batch.id


@router.get("/queue", response_model=QueueFacts)
def queue(service: Context, principal: Viewer) -> dict[str, object]:
    """Say which jobs wait, in order, and which may start now."""
    every = service.jobs.all()
    seen = {job.id: job for job in every if principal.sees(job.record.tenant)}
    ids = queue_of(every, service.jobs.limits())
    return {
        "jobs": counts(list(seen.values())),
        **{name: [id for id in found if id in seen] for name, found in ids.items()},
    }


@router.get("/jobs/{id}", response_model=JobDetail)
def get_job(service: Context, principal: Viewer, id: Id) -> dict[str, object]:
    """Say how a job stands, and what happened to it."""
    job = find_job(service, principal, id)
    manifest = json.loads(job.record.manifest.model_dump_json())
    told = {"obstacle": obstacle_of(service.jobs, job), "journal": history(job), "manifest": manifest}
    return {**facts(job), **told}


@router.get("/drivers", response_model=DriverList)
def list_drivers(service: Context, principal: Monitor) -> dict[str, object]:
    """List the drivers that were heard of lately: what they have, and, for an admin, what they said last."""
    told = principal.role is Role.ADMIN
    return {
        "drivers": [
            {
                "holder": one.record.holder,
                "gpus": one.record.gpus,
                "heard": one.heard.isoformat(timespec="seconds"),
                "said": one.record.said if told else None,
            }
            for one in drivers(service.jobs)
        ]
    }


@router.post("/jobs/{id}/cancel", response_model=JobFacts)
def cancel_job(service: Context, principal: Submitter, id: Id) -> dict[str, object]:
    """Stop a job; what it has finished is kept. A job at its end stays as it is."""
    find_job(service, principal, id)
    return facts(cancel(service.jobs, id, f"by {principal.name}"))


@router.delete(
    "/jobs/{id}",
    response_model=JobFacts,
    responses={409: {"description": "It is not at its end."}},
)
def delete_job(service: Context, principal: Submitter, id: Id) -> dict[str, object]:
    """Put a job that is at its end out of sight, with its logs. Its artifact stays; the same manifest becomes another job."""
    find_job(service, principal, id)
    try:
        return facts(delete(service.jobs, id, f"by {principal.name}"))
    except NotAtEndError as error:
        raise Refused(409, str(error)) from error


@router.get("/jobs/{id}/events", response_class=Response, responses={200: STREAM, 204: OVER})
def watch(service: Context, principal: Viewer, id: Id, last: LastEvent = None) -> Response:
    """Follow a job until it is at its end: `state` with its facts when its state changes, the events of its runs by their kind
    where its output is below the service's roots, and `end`."""
    job = find_job(service, principal, id)
    if last == END:
        return Response(status_code=204)
    return streamed(service, principal.name, job, EventSource(service, job, place_in(last)))


@router.get("/jobs/{id}/logs", response_class=Response, responses={200: STREAM, 204: OVER})
def logs(service: Context, principal: Viewer, id: Id, last: LastEvent = None) -> Response:
    """Follow what the runs of a job say: `line` with attempt and text, and `end`."""
    job = find_job(service, principal, id)
    if last == END:
        return Response(status_code=204)
    return streamed(service, principal.name, job, LogSource(service, job, place_in(last)))
