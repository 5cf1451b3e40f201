"""Manifests that come over the network become jobs: checked by the same code as the command's, and where their places lie.

Everything is checked before anything is written: what is refused leaves no trace.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from counterweight.pipeline.jobs.batch import Batch, put_batch
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.record import JobRecord, record_of
from counterweight.pipeline.jobs.schedule import Schedule
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.submit import put_job, submit_job
from counterweight.pipeline.manifest import Submission, parse_bundle, parse_manifest
from counterweight.pipeline.manifest.problems import MAX_LINES
from counterweight.pipeline.service.bodies import Body
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.problems import Refused, invalid
from counterweight.pipeline.service.tokens import Principal
from counterweight.workers.errors import ManifestError, RequestError, UnknownIdError
from counterweight.workers.keys import digest

MAX_NUMBER = 999_999_999_999


@dataclass(frozen=True, slots=True)
class Order:
    """How something is submitted. key: the request's Idempotency-Key."""

    tenant: str
    priority: int = 0
    again: bool = False
    key: str | None = None

    @property
    def number(self) -> int | None:
        """Which further time it is, where that is known beforehand: a request with a key that is repeated, to whichever
        instance, is the same time. None: the next one that is free."""
        if not self.again:
            return 0
        return None if self.key is None else number_of(self.tenant, self.key)


def number_of(tenant: str, key: str) -> int:
    """Of the jobs that a request with this key asks for once more."""
    return 1 + int(digest([tenant, key])[:16], 16) % MAX_NUMBER


def create_job(service: Service, principal: Principal, body: Body, order: Order) -> tuple[Job, bool]:
    """The job of a manifest, and whether this call made it."""
    try:
        job = parse_manifest(body.data, name=body.name, base=None).job
        _check_places(service.roots.refused(job))
        first = record_of(job, tenant=order.tenant, priority=order.priority, again=order.number or 0)
    except RequestError as error:
        raise invalid(error) from error
    if order.number is None:
        return submit_job(service.jobs, job, tenant=order.tenant, priority=order.priority, again=True)
    _check_tenants(service, principal, [first])
    found, created = put_job(service.jobs, first)
    if found.state is State.DELETED:
        return submit_job(service.jobs, job, tenant=order.tenant, priority=order.priority)
    return found, created


def create_batch(service: Service, principal: Principal, body: Body, order: Order) -> tuple[Batch, bool]:
    """The batch of a bundle, and whether this call made it."""
    asked = _bundle(service, body, order)
    batch, number = asked.batch, order.number
    assert batch is not None
    if batch.spec.schedule is not None:
        raise invalid(RequestError("batch.spec.schedule: expected none; batches with one belong to /v1/schedules"))
    if number is None:  # the next free number of the batch may be taken by another tenant's job
        number = number_of(order.tenant, secrets.token_hex(16))
    records = [record_of(one.job, tenant=order.tenant, again=number) for one in asked.jobs]
    _check_tenants(service, principal, records)
    return put_batch(service.jobs, batch, asked.jobs, number, tenant=order.tenant, priority=order.priority)


def create_schedule(service: Service, principal: Principal, body: Body, order: Order) -> tuple[Schedule, bool]:
    """The schedule of a bundle, and whether this call made it."""
    asked = _bundle(service, body, order)
    assert asked.batch is not None
    if asked.batch.spec.schedule is None:
        raise invalid(RequestError("batch.spec.schedule: null: expected a cron expression"))
    schedule, created = service.schedules.submit(asked.batch, asked.jobs, tenant=order.tenant, priority=order.priority)
    if not principal.sees(schedule.record.tenant):
        raise _another_tenants()
    return schedule, created


def _bundle(service: Service, body: Body, order: Order) -> Submission:
    try:
        asked = parse_bundle(body.data, body.name)
        for one in asked.jobs:
            record_of(one.job, tenant=order.tenant, priority=order.priority)  # refuses what it would refuse later
    except RequestError as error:
        raise invalid(error) from error
    _check_places([f"{one.job.metadata.name}.{line}" for one in asked.jobs for line in service.roots.refused(one.job)])
    return asked


def _check_places(lines: list[str]) -> None:
    if lines:
        raise invalid(ManifestError("\n".join(lines[:MAX_LINES])))


def _check_tenants(service: Service, principal: Principal, records: Sequence[JobRecord]) -> None:
    """A manifest is one job, whoever submits it: the first one's."""
    for record in records:
        try:
            known = service.jobs.get(record.id)
        except UnknownIdError:
            continue
        if not principal.sees(known.record.tenant):
            raise _another_tenants()


def _another_tenants() -> Refused:
    return Refused(409, "another tenant submitted this manifest: with again=true it becomes a job of your own")
