"""The commands about jobs. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from counterweight.pipeline.terminal import absolute, print_json, print_rows, print_table

if TYPE_CHECKING:
    from counterweight.pipeline.jobs.store import JobStore

STORE = "COUNTERWEIGHT_STORE"
"""Environment variable: the store of the jobs."""

FOLLOW_SECONDS = 1.0
"""Between two looks of `logs -f`."""

_STORE_HELP = "URI of the store that holds the jobs"
Store = Annotated[
    str | None, typer.Option("--store", envvar=STORE, help=f"{_STORE_HELP}.", show_default=False, show_envvar=True)
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for command in (submit, status, logs, cancel, work, limits):
        app.command()(command)
    app.command("list")(list_jobs)


def submit(
    manifest: Annotated[str, typer.Argument(help="Path or URI of a manifest (YAML).", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field: spec.recipe.weights.bits=3. Repeatable.", show_default=False),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Replaces spec.output.uri.", show_default=False)] = None,
    store: Annotated[
        str | None,
        typer.Option(envvar=STORE, help=f"{_STORE_HELP}; default: the job's output.", show_default=False),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="A further job, though this manifest was submitted.")] = False,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="One step is worth an hour of waiting.")] = 0,
    tenant: Annotated[str, typer.Option(help="For whom, where tenants have limits.")] = "default",
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS",
            help="http://host:port of Ray's Job Submission, which starts the driver; default: a process of this machine.",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter on the cluster; default: the path of this one.", show_default=False)
    ] = None,
    drive: Annotated[
        bool, typer.Option("--drive/--no-drive", help="Start a driver, or leave that to `counterweight work`.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Make a job known and start a driver for it; the last line of stdout is its id. The same manifest is the same job."""
    from counterweight.pipeline.jobs.facts import facts
    from counterweight.pipeline.jobs.launch import launch
    from counterweight.pipeline.jobs.submit import submit_job
    from counterweight.pipeline.manifest import load_manifest

    overrides = [*(set_ or []), *([] if output is None else [f"spec.output.uri={json.dumps(absolute(output))}"])]
    loaded = load_manifest(manifest, overrides).job
    jobs = _jobs(store or loaded.spec.output.uri)
    job, created = submit_job(jobs, loaded, tenant=tenant, priority=priority, again=again)
    driver = None
    if drive and not job.state.terminal and not job.live:
        driver = launch(jobs.store.uri, job.id, dashboard=address, python=python)
    if as_json:
        print_json({**facts(job), "store": jobs.store.uri, "created": created, "started": driver})
        return
    known = "submitted" if created else f"known already, {job.state.value}"
    typer.echo(f"job {job.id}: {known}; store {jobs.store.uri}", err=True)
    if driver is not None:
        typer.echo(f"driver: {driver}", err=True)
    typer.echo(job.id)


def status(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Id of a job.", show_default=False)] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Say how a job stands and what happened to it; without an id, how many there are and which are next."""
    from counterweight.pipeline.jobs.facts import counts, facts, history, rows
    from counterweight.pipeline.jobs.queue import in_order, startable
    from counterweight.pipeline.jobs.store import entrant_of

    jobs = _jobs(store)
    if id is not None:
        job = jobs.get(id)
        if as_json:
            print_json({**facts(job), "journal": history(job)})
        else:
            print_rows(f"job {job.id}", rows(job))
        return
    every = jobs.all()
    entrants, bounds = [entrant_of(job) for job in every], jobs.limits()
    waiting, next_ = [entrant.id for entrant in in_order(entrants)], startable(entrants, bounds)
    if as_json:
        print_json({"jobs": counts(every), "queue": waiting, "startable": next_, "limits": bounds.model_dump()})
        return
    told = [(state, str(count)) for state, count in counts(every).items()]
    print_rows(f"jobs in {jobs.store.uri}", [*told, ("queue", " ".join(waiting) or "empty")])


def logs(
    id: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is at its end.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Print what a job's runs have said, attempt by attempt."""
    from counterweight.pipeline.jobs.logs import LogReader

    jobs = _jobs(store)
    reader = LogReader(jobs, id)
    while True:
        over = jobs.get(id).state.terminal or not follow  # before reading: what is said until the end is printed
        for line in reader.lines():
            typer.echo(json.dumps({"attempt": line.attempt, "line": line.text}) if as_json else line.text)
        if over:
            return
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)


def cancel(id: JobId, store: Store = None, as_json: AsJson = False) -> None:
    """Stop a job; what it has finished is kept."""
    from counterweight.pipeline.jobs.facts import facts
    from counterweight.pipeline.jobs.lease import cancel as cancel_job

    job = cancel_job(_jobs(store), id)
    if as_json:
        print_json(facts(job))
    else:
        typer.echo(job.state.value)


def list_jobs(
    state: Annotated[
        str | None, typer.Option(help="Only those in this state, such as running.", show_default=False)
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.", show_default=False)] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a store, first submitted first."""
    from counterweight.pipeline.jobs.facts import facts, table
    from counterweight.pipeline.jobs.states import State
    from counterweight.workers.errors import RequestError

    if state is not None and state not in {known.value for known in State}:
        raise RequestError(f"--state {state[:50]!r}: expected {', '.join(known.value for known in State)}")
    found = [
        job for job in _jobs(store).all() if state in (None, job.state.value) and tenant in (None, job.record.tenant)
    ]
    if as_json:
        print_json([facts(job) for job in found])
    else:
        print_table(table(found))


def work(
    store: Store = None,
    until: Annotated[
        str | None, typer.Option(metavar="ID", help="End when this job does, with its exit code.", show_default=False)
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="End when all jobs are at their end.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray for the jobs, as of `run`; default: an embedded one.", show_default=False)
    ] = None,
) -> None:
    """Drive jobs: whichever may start, one after the other; and take over those whose driver died."""
    from functools import partial

    from counterweight.pipeline.jobs.attempt import ProcessAttempt
    from counterweight.pipeline.jobs.drive import Driver, never, until_ended, until_idle
    from counterweight.workers.errors import RequestError

    if until is not None and idle:
        raise RequestError("--until with --idle: expected one of them")
    jobs = _jobs(store)
    if until is not None:
        jobs.get(until)
    start = partial(ProcessAttempt, arguments=() if address is None else ("--address", address))
    driver = Driver(jobs, start, note=lambda text: typer.echo(text, err=True))
    driver.work(until_idle if idle else never if until is None else until_ended(until))
    if until is not None and (ended := jobs.get(until).ended) is not None and ended.artifact is None:
        raise typer.Exit(ended.exit_code or 0)


def limits(
    concurrency: Annotated[
        int | None, typer.Option(min=-1, help="Jobs at once; -1: no limit.", show_default=False)
    ] = None,
    per_tenant: Annotated[
        int | None, typer.Option(min=-1, help="Jobs of one tenant at once; -1: no limit.", show_default=False)
    ] = None,
    tenant: Annotated[
        list[str] | None, typer.Option(help="NAME=JOBS for a tenant of its own. Repeatable.", show_default=False)
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Print, and with options change, how many jobs may run at once; it holds for all drivers from their next look on."""
    from counterweight.pipeline.jobs.limits import changed

    jobs = _jobs(store)
    bounds = jobs.limits()
    if concurrency is not None or per_tenant is not None or tenant:
        bounds = changed(bounds, concurrency, per_tenant, tenant or [])
        jobs.set_limits(bounds)
    if as_json:
        print_json(bounds.model_dump())
        return
    shown = {"concurrency": bounds.concurrency, "per tenant": bounds.per_tenant, **bounds.tenants}
    print_rows(f"limits of {jobs.store.uri}", [(name, str(bound)) for name, bound in shown.items()])


def _jobs(uri: str | None) -> JobStore:
    from counterweight.pipeline.jobs.store import JobStore
    from counterweight.workers.errors import RequestError

    if uri is None:
        raise RequestError(f"no store: expected --store URI or {STORE}: what `submit` said, or a job's output")
    return JobStore.at(absolute(uri))
