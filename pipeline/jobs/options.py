"""What the commands about jobs share: where the jobs are, and how they are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from counterweight.pipeline.terminal import absolute

if TYPE_CHECKING:
    from counterweight.pipeline.jobs.store import JobStore

STORE = "COUNTERWEIGHT_STORE"
"""Environment variable: the store of the jobs."""

STORE_HELP = "URI of the store that holds the jobs"

Store = Annotated[
    str | None, typer.Option("--store", envvar=STORE, help=f"{STORE_HELP}.", show_default=False, show_envvar=True)
]
AnyId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job or of a batch.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def jobs_at(uri: str | None) -> JobStore:
    """The jobs of a store that is named on the command line or in the environment. RequestError."""
    from counterweight.pipeline.jobs.store import JobStore
    from counterweight.workers.errors import RequestError

    if uri is None:
        raise RequestError(f"no store: expected --store URI or {STORE}: what `submit` said, or a job's output")
    return JobStore.at(absolute(uri))
