"""The application: routes, errors, headers and the firing of schedules, put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from counterweight.pipeline.service import api_artifacts, api_batches, api_jobs, health, metrics, pages
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.headers import SecurityHeaders
from counterweight.pipeline.service.problems import MEDIA_TYPE, Problem, Refused, answer, refusal_of
from counterweight.workers.errors import CounterweightError

TICK_SECONDS = 5.0
"""Between two looks at what schedules are due."""

log = logging.getLogger("counterweight.service")


def make_app(service: Service, *, fires: bool = False) -> FastAPI:
    """The service as an ASGI application. fires: it fires the store's schedules."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(fire_schedules(service)) if fires else None
        yield
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    app = FastAPI(
        title="Counterweight",
        version="1",
        summary="Compressions of large language models: submitted, watched, pulled.",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # their pages load assets from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        strict_content_type=False,
    )
    app.state.service = service
    refusals = {code: {"description": text, "content": PROBLEM} for code, text in REFUSALS.items()}
    v1 = APIRouter(prefix="/v1", responses=refusals)
    for part in (api_jobs, api_batches, api_artifacts):
        v1.include_router(part.router)
    app.include_router(v1)
    app.include_router(health.router, responses=refusals)
    app.include_router(metrics.router)
    app.include_router(pages.router)
    for kind in (Refused, CounterweightError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _refuse)
    app.add_middleware(SecurityHeaders)
    if (requests := metrics.make_requests()) is not None:
        app.state.requests = requests
        app.add_middleware(metrics.Measured, requests=requests)
    make_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = make_openapi()
        schemas = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        found = document.setdefault("components", {}).setdefault("schemas", {})
        found.update(schemas.pop("$defs", {}), Problem=schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way of extending it
    return app


PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
REFUSALS: dict[int | str, str] = {"4XX": "The request is wrong.", "5XX": "The service or its store fails."}


async def _refuse(request: Request, error: Exception) -> Response:
    refused = refusal_of(error)
    if refused.problem.status >= 500:
        log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1")
    return pages.refused_page(request, refused) if page else answer(refused)


async def fire_schedules(service: Service) -> None:
    """Fires what is due, as `counterweight work` does, until it is cancelled. Any number of instances may: each firing is
    decided once, in the store."""
    schedules = service.schedules
    while True:
        try:
            await run_in_threadpool(schedules.tick)
        except CounterweightError as error:  # a store that is away, or a damaged record: others fire nevertheless
            log.warning("schedules wait: %s", error)
        await service.pause(TICK_SECONDS)
