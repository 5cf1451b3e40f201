"""Whether the service lives, and whether it can serve: for whoever restarts it or sends it requests. Without a token."""

from __future__ import annotations

from fastapi import APIRouter, Request

from counterweight.pipeline.service.context import service_of
from counterweight.pipeline.service.models import Health

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health)
async def lives() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", response_model=Health)
def ready(request: Request) -> Health:
    """The job store can be read."""
    service_of(request).readiness.check()
    return Health()
