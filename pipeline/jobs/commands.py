"""The commands that watch jobs and stop them: they read the store alone, and work when Ray and every driver are down. Every
import that costs time is inside the command that needs it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from counterweight.pipeline.jobs.drive_commands import limits, submit, work
from counterweight.pipeline.jobs.options import AnyId, AsJson, Store, jobs_at
from counterweight.pipeline.terminal import print_json, print_rows, print_table

FOLLOW_SECONDS = 1.0
"""Between two looks of `logs -f`."""


def register(app: typer.Typer) -> None:
    """Adds the commands about jobs to the application."""
    for command in (submit, status, logs, cancel, delete, report, work, limits):
        app.command()(command)
    app.command("list")(list_jobs)


def status(
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Id of a job or of a batch.", show_default=False)
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Say how a job or a batch stands and what happened to it; without an id, how many there are and which are next."""
    from counterweight.pipeline.jobs.drivers import obstacle_of
    from counterweight.pipeline.jobs.facts import batch_facts, counts, facts, history, rows, schedule_facts, table
    from counterweight.pipeline.jobs.requests import batch_or_job
    from counterweight.pipeline.jobs.schedule import Schedules, is_schedule
    from counterweight.pipeline.jobs.store import queue_of

    jobs = jobs_at(store)
    if id is None:
        every = jobs.all()
        queue = queue_of(every, jobs.limits())
        if as_json:
            print_json({"jobs": counts(every), **queue})
            return
        told = [(state, str(count)) for state, count in counts(every).items()]
        print_rows(f"jobs in {jobs.store.uri}", [*told, ("queue", " ".join(queue["queue"]) or "empty")])
        return
    if is_schedule(id):
        known = schedule_facts(Schedules(jobs).get(id), jobs.store.now())
        if as_json:
            print_json(known)
        else:
            print_rows(id, [(name, str(value)) for name, value in known.items() if name != "id"])
        return
    batch, job = batch_or_job(jobs, id)
    if batch is not None:
        if as_json:
            print_json({**batch_facts(batch), "jobs": [facts(one) for one in batch.jobs]})
        else:
            print_rows(
                f"{batch.id}", [(name, str(value)) for name, value in batch_facts(batch).items() if name != "id"]
            )
            print_table(table(batch.jobs))
    elif job is not None:
        why = obstacle_of(jobs, job)
        if as_json:
            print_json({**facts(job), "obstacle": why, "journal": history(job)})
        else:
            print_rows(f"job {job.id}", [*rows(job), *([] if why is None else [("obstacle", why)])])


def logs(
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a job.", show_default=False)],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is at its end.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Print what a job's runs have said, attempt by attempt."""
    from counterweight.pipeline.jobs.logs import LogReader

    jobs = jobs_at(store)
    reader = LogReader(jobs, id)
    while True:
        over = jobs.get(id).state.terminal or not follow  # before reading: what is said until the end is printed
        for line in reader.lines():
            typer.echo(json.dumps({"attempt": line.attempt, "line": line.text}) if as_json else line.text)
        if over:
            return
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)


def cancel(id: AnyId, store: Store = None, as_json: AsJson = False) -> None:
    """Stop a job, or all jobs of a batch, keeping what they have finished; or a schedule, which then fires no more."""
    from counterweight.pipeline.jobs.facts import facts, schedule_facts
    from counterweight.pipeline.jobs.lease import cancel as cancel_job
    from counterweight.pipeline.jobs.requests import members
    from counterweight.pipeline.jobs.schedule import Schedules, is_schedule

    jobs = jobs_at(store)
    if is_schedule(id):
        stopped = schedule_facts(Schedules(jobs).stop(id), jobs.store.now())
        if as_json:
            print_json([stopped])
        else:
            typer.echo(f"{id}  {stopped['state']}")
        return
    cancelled = [cancel_job(jobs, one) for one in members(jobs, id)]
    if as_json:
        print_json([facts(job) for job in cancelled])
        return
    for job in cancelled:
        typer.echo(f"{job.id}  {job.state.value}")


def list_jobs(
    state: Annotated[
        str | None, typer.Option(help="Only those in this state, such as running.", show_default=False)
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.", show_default=False)] = None,
    batch: Annotated[str | None, typer.Option(help="Only those of this batch.", show_default=False)] = None,
    batches: Annotated[bool, typer.Option("--batches", help="List batches instead.")] = False,
    schedules: Annotated[bool, typer.Option("--schedules", help="List schedules instead.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a store, first submitted first."""
    from counterweight.pipeline.jobs.batch import all_batches
    from counterweight.pipeline.jobs.facts import batch_facts, batch_table, facts, schedule_facts, schedule_table, table
    from counterweight.pipeline.jobs.requests import members
    from counterweight.pipeline.jobs.schedule import Schedules
    from counterweight.pipeline.jobs.states import State
    from counterweight.workers.errors import RequestError

    if state is not None and state not in {known.value for known in State}:
        raise RequestError(f"--state {state[:50]!r}: expected {', '.join(known.value for known in State)}")
    jobs = jobs_at(store)
    if batches:
        found = all_batches(jobs)
        if as_json:
            print_json([batch_facts(one) for one in found])
        else:
            print_table(batch_table(found))
        return
    if schedules:
        told = [schedule_facts(one, jobs.store.now()) for one in Schedules(jobs).all()]
        if as_json:
            print_json(told)
        else:
            print_table(schedule_table(told))
        return
    ids, wanted = (
        None if batch is None else members(jobs, batch),
        next((one for one in State if one.value == state), None),
    )
    chosen = [
        job
        for job in jobs.all()
        if job.listed(wanted) and tenant in (None, job.record.tenant) and (ids is None or job.id in ids)
    ]
    if as_json:
        print_json([facts(job) for job in chosen])
    else:
        print_table(table(chosen))


def delete(
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a job.", show_default=False)],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Put a job that is at its end out of sight, with its logs. Its artifact stays; its manifest can be submitted anew."""
    from counterweight.pipeline.jobs.facts import facts
    from counterweight.pipeline.jobs.lease import delete as delete_job

    deleted = delete_job(jobs_at(store), id)
    if as_json:
        print_json(facts(deleted))
    else:
        typer.echo(f"{deleted.id}  {deleted.state.value}")


def report(
    batch: Annotated[str, typer.Argument(metavar="BATCH", help="Id of a batch.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="A folder for batch.json and batch.html.", show_default=False)
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Compare the artifacts of a batch: bits per weight against perplexity and KL, and which are on the Pareto front."""
    from counterweight.pipeline.jobs.batch import get_batch
    from counterweight.pipeline.jobs.facts import pareto_table
    from counterweight.pipeline.jobs.pareto import summary

    found = summary(get_batch(jobs_at(store), batch))
    if output is not None:
        from counterweight.pipeline.jobs.batch_page import write_summary

        write_summary(found, output)
    if as_json:
        print_json(found.facts())
    else:
        print_table(pareto_table(found))
