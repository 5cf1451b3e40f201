"""Routes about batches and schedules."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from counterweight.pipeline.jobs.batch import BATCH_ID
from counterweight.pipeline.jobs.facts import batch_facts, facts, schedule_facts
from counterweight.pipeline.jobs.lease import cancel
from counterweight.pipeline.jobs.pareto import summary
from counterweight.pipeline.jobs.schedule import SCHEDULE_ID
from counterweight.pipeline.service.access import (
    Context,
    Submitter,
    Viewer,
    find_batch,
    find_schedule,
    tenant_for,
    visible_batches,
    visible_schedules,
)
from counterweight.pipeline.service.api_jobs import MANIFEST, Ordered, Priority, Tenant, located
from counterweight.pipeline.service.bodies import ManifestBody, documented
from counterweight.pipeline.service.models import (
    BatchDetail,
    BatchFacts,
    BatchList,
    BatchReport,
    ScheduleFacts,
    ScheduleList,
)
from counterweight.pipeline.service.submission import Order, create_batch, create_schedule

BUNDLE = {
    "type": "object",
    "description": "A CompressionBatch, and the manifests that its `spec.jobs` name: the service reads none from elsewhere.",
    "required": ["batch", "manifests"],
    "properties": {"batch": {"type": "object"}, "manifests": {"type": "object", "additionalProperties": MANIFEST}},
}

BatchId = Annotated[str, Path(pattern=f"^{BATCH_ID}$", description="Id of a batch.")]
ScheduleId = Annotated[str, Path(pattern=f"^{SCHEDULE_ID}$", description="Id of a schedule.")]

router = APIRouter(tags=["batches and schedules"])


@router.post(
    "/batches",
    status_code=201,
    response_model=BatchFacts,
    responses={200: {"model": BatchFacts, "description": "It was submitted before."}},
    openapi_extra=documented(BUNDLE),
)
def submit_batch(
    service: Context,
    principal: Submitter,
    body: ManifestBody,
    order: Ordered,
    response: Response,
) -> dict[str, object]:
    """Submit a batch with its manifests. The same batch is the same one."""
    batch, created = create_batch(service, principal, body, order)
    located(response, f"/v1/batches/{batch.id}", created=created)
    return batch_facts(batch)


@router.get("/batches", response_model=BatchList)
def list_batches(service: Context, principal: Viewer) -> dict[str, object]:
    """List batches, first submitted first."""
    return {"batches": [batch_facts(batch) for batch in visible_batches(service, principal)]}


@router.get("/batches/{id}", response_model=BatchDetail)
def get_batch(service: Context, principal: Viewer, id: BatchId) -> dict[str, object]:
    """Say how a batch and its jobs stand."""
    batch = find_batch(service, principal, id)
    return {**batch_facts(batch), "jobs": [facts(job) for job in batch.jobs]}


@router.post("/batches/{id}/cancel", response_model=BatchDetail)
def cancel_batch(service: Context, principal: Submitter, id: BatchId) -> dict[str, object]:
    """Stop all jobs of a batch."""
    for job in find_batch(service, principal, id).jobs:
        cancel(service.jobs, job.id, f"by {principal.name}")
    return get_batch(service, principal, id)


@router.get("/batches/{id}/report", response_model=BatchReport)
def report(service: Context, principal: Viewer, id: BatchId) -> dict[str, object]:
    """Compare what a batch published: bits per weight against perplexity and KL, with the Pareto fronts."""
    return summary(find_batch(service, principal, id), service.roots.contains).facts()


@router.post(
    "/schedules",
    status_code=201,
    response_model=ScheduleFacts,
    responses={200: {"model": ScheduleFacts, "description": "It was submitted before."}},
    openapi_extra=documented(BUNDLE),
)
def submit_schedule(
    service: Context,
    principal: Submitter,
    body: ManifestBody,
    response: Response,
    tenant: Tenant = None,
    priority: Priority = 0,
) -> dict[str, object]:
    """Submit a batch that has `spec.schedule`: it is run whenever that fires."""
    schedule, created = create_schedule(service, principal, body, Order(tenant_for(principal, tenant), priority))
    located(response, f"/v1/schedules/{schedule.record.id}", created=created)
    return schedule_facts(schedule, service.jobs.store.now())


@router.get("/schedules", response_model=ScheduleList)
def list_schedules(service: Context, principal: Viewer) -> dict[str, object]:
    """List schedules with their next firings."""
    now = service.jobs.store.now()
    return {"schedules": [schedule_facts(one, now) for one in visible_schedules(service, principal)]}


@router.get("/schedules/{id}", response_model=ScheduleFacts)
def get_schedule(service: Context, principal: Viewer, id: ScheduleId) -> dict[str, object]:
    """Say when a schedule fires, and what became of its firings."""
    return schedule_facts(find_schedule(service, principal, id), service.jobs.store.now())


@router.post("/schedules/{id}/stop", response_model=ScheduleFacts)
def stop_schedule(service: Context, principal: Submitter, id: ScheduleId) -> dict[str, object]:
    """Let a schedule fire no more; what it has started goes on."""
    find_schedule(service, principal, id)
    return schedule_facts(service.schedules.stop(id), service.jobs.store.now())
