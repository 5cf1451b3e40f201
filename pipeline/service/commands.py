"""The command `serve`. Every import that costs time, or that not every installation has, is inside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterweight.pipeline.jobs.options import Store, jobs_at
from counterweight.pipeline.log_format import Format, LogFormat, logging_config

if TYPE_CHECKING:
    from counterweight.pipeline.service.tokens import Tokens

TOKENS = "COUNTERWEIGHT_TOKENS"
"""Environment variable: the tokens, in the place of a file."""

SHUTDOWN_SECONDS = 5
"""That open streams are given when the service is to end."""

MAX_HEADER_BYTES = 32 << 10


def serve(
    store: Store = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Where models, texts and outputs of jobs may lie: s3://bucket/prefix, file:/directory, or hf: for the hub. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help=f"File of the tokens (JSON); default: what {TOKENS} holds.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8080,
    rate: Annotated[float, typer.Option(min=0.1, max=1e6, help="Requests a second of one token, per instance.")] = 20.0,
    burst: Annotated[int, typer.Option(min=1, max=1_000_000, help="Requests of one token at once.")] = 100,
    schedules: Annotated[
        bool, typer.Option("--schedules/--no-schedules", help="Fire the store's schedules, as `work` does.")
    ] = True,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Serve the jobs of a store over HTTP: an API for programs and pages for people. `counterweight work` drives the jobs."""
    from counterweight.workers.errors import RequestError

    try:
        import fastapi  # noqa: F401
        import jinja2  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise RequestError(f"serve: no module {error.name}: expected pip install 'counterweight[service]'") from error
    jobs, known = jobs_at(store), _tokens(tokens)

    from counterweight.pipeline.jobs.submit import check_store
    from counterweight.pipeline.service.app import make_app
    from counterweight.pipeline.service.context import Service
    from counterweight.pipeline.service.roots import Roots
    from counterweight.pipeline.service.throttle import Throttle

    check_store(jobs)  # now, rather than while the first of many clients wait
    service = Service(jobs, known, Roots.parse(allow or []), Throttle(rate=rate, burst=burst))
    if not allow:
        typer.echo("no --allow: every submission will be refused, and no artifact given", err=True)
    config = uvicorn.Config(
        make_app(service, fires=schedules),
        host=host,
        port=port,
        access_log=False,
        log_config=uvicorn.config.LOGGING_CONFIG
        if (told := logging_config(log_format, sys.stderr)) is None
        else dict(told),
        log_level="info",
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run()


def _tokens(path: Path | None) -> Tokens:
    """RequestError where there are none."""
    from counterweight.pipeline.service.tokens import Tokens
    from counterweight.workers.errors import RequestError

    if path is None:
        text = os.environ.get(TOKENS)
        if text is None:
            raise RequestError(f"no tokens: expected --tokens FILE or {TOKENS}")
        return Tokens.parse(text, TOKENS)
    try:
        return Tokens.parse(path.read_bytes(), f"--tokens {path}")
    except OSError as error:
        raise RequestError(f"--tokens {path}: {error.strerror or error}") from error


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(serve)
