"""The commands that make jobs known and drive them. Every import that costs time is inside the command that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from counterweight.pipeline.jobs.options import STORE, STORE_HELP, AsJson, Store, jobs_at
from counterweight.pipeline.log_format import Format, LogFormat, teller
from counterweight.pipeline.terminal import SET_HELP, absolute, print_json, print_rows

if TYPE_CHECKING:
    from counterweight.pipeline.jobs.attempt import Starter
    from counterweight.pipeline.manifest import Submission


def submit(
    manifest: Annotated[str, typer.Argument(help="Path or URI of a manifest (YAML).", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=SET_HELP,
            show_default=False,
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Replaces spec.output.uri.", show_default=False)] = None,
    store: Annotated[
        str | None,
        typer.Option(envvar=STORE, help=f"{STORE_HELP}; default: the job's output.", show_default=False),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="A further job or batch, though it was submitted.")] = False,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="One step is worth an hour of waiting.")] = 0,
    tenant: Annotated[str, typer.Option(help="For whom, where tenants have limits.")] = "default",
    max_failures: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Replaces spec.max_failures of a batch: beyond it, what has not begun is cancelled.",
            show_default=False,
        ),
    ] = None,
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
    """Make a job or a batch known and start its drivers; the last line of stdout is its id. The same manifest is the same
    job."""
    from counterweight.pipeline.jobs.launch import launch
    from counterweight.pipeline.jobs.requests import submitted
    from counterweight.pipeline.manifest import load_submission

    changes = [*(set_ or []), *([] if max_failures is None else [f"spec.max_failures={max_failures}"])]
    asked = load_submission(manifest, changes, None if output is None else absolute(output))
    jobs = jobs_at(store or _output(asked))
    known = submitted(jobs, asked, tenant=tenant, priority=priority, again=again)
    wanted = known.drivers if drive else 0
    started = [launch(jobs.store.uri, known.id, dashboard=address, python=python) for _ in range(wanted)]
    if as_json:
        print_json({**known.facts, "store": jobs.store.uri, "created": known.created, "started": started})
        return
    how = "submitted" if known.created else f"known already, {known.facts['state']}"
    typer.echo(f"{known.id}: {how}; store {jobs.store.uri}", err=True)
    for driver in started:
        typer.echo(f"driver: {driver}", err=True)
    typer.echo(known.id)


def _output(asked: Submission) -> str:
    """Where all of its jobs write, which is where they are known when no store is named. RequestError."""
    from counterweight.workers.errors import RequestError

    outputs = sorted({one.job.spec.output.uri for one in asked.jobs})
    if len(outputs) > 1:
        raise RequestError(f"jobs write to {outputs[0]} and {outputs[1]}: expected --store URI or {STORE}")
    return outputs[0]


def work(
    store: Store = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="ID", help="End when this job or batch does, with its exit code.", show_default=False),
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="End when all jobs are at their end.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Where jobs have their workers, as of `run`.", show_default=False)
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of this machine, where jobs have their workers here; default: all of them."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where Prometheus finds the metrics of this driver's runs."),
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Drive jobs: whichever may start, one after the other; take over those whose driver died; and fire schedules."""
    from functools import partial

    from counterweight.pipeline.jobs.attempt import ProcessAttempt
    from counterweight.pipeline.jobs.drive import never, until_ended, until_idle
    from counterweight.pipeline.jobs.requests import members
    from counterweight.pipeline.jobs.standby import devices, measured, stand_by
    from counterweight.workers.errors import RequestError

    if until is not None and idle:
        raise RequestError("--until with --idle: expected one of them")
    jobs = jobs_at(store)
    ids = [] if until is None else members(jobs, until)
    start: Starter = partial(ProcessAttempt, arguments=() if address is None else ("--address", address))
    stand_by(
        jobs,
        start if metrics is None else measured(start, metrics),
        teller(log_format, "counterweight.driver"),
        enough=until_idle if idle else until_ended(*ids) if ids else never,
        gpus=devices(address, gpus),
        fires=not (ids or idle),  # whoever is there for some jobs alone does not
    )
    raise typer.Exit(max((jobs.get(id).exit_code for id in ids), default=0))


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

    jobs = jobs_at(store)
    bounds = jobs.limits()
    if concurrency is not None or per_tenant is not None or tenant:
        bounds = changed(bounds, concurrency, per_tenant, tenant or [])
        jobs.set_limits(bounds)
    if as_json:
        print_json(bounds.model_dump())
        return
    shown = {"concurrency": bounds.concurrency, "per tenant": bounds.per_tenant, **bounds.tenants}
    print_rows(
        f"limits of {jobs.store.uri}",
        [(name, "any number" if bound is None else str(bound)) for name, bound in shown.items()],
    )
