"""Pages for people: rendered here, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from counterweight.pipeline.artifact.document import REPORT_PAGE
from counterweight.pipeline.artifact.report_html.page import POLICY
from counterweight.pipeline.artifact.report_html.style import STYLE
from counterweight.pipeline.jobs.batch_page import batch_sections
from counterweight.pipeline.jobs.drivers import obstacle_of
from counterweight.pipeline.jobs.facts import batch_facts, counts, facts, history, schedule_facts
from counterweight.pipeline.jobs.lease import cancel
from counterweight.pipeline.jobs.pareto import summary
from counterweight.pipeline.jobs.store import queue_of
from counterweight.pipeline.service.access import (
    Context,
    find_batch,
    find_job,
    require,
    visible_batches,
    visible_schedules,
)
from counterweight.pipeline.service.artifacts import ID, NAME, find_artifact
from counterweight.pipeline.service.bodies import Body
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.cursors import page
from counterweight.pipeline.service.job_view import artifact_path, last_lines, progress_of
from counterweight.pipeline.service.lines import placed
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.session import COOKIE, FIELD, Person, form_of, proof, proven_form, sign_in
from counterweight.pipeline.service.submission import Order, create_batch, create_job, create_schedule
from counterweight.pipeline.service.tokens import Principal, Role
from counterweight.workers.errors import StorageError, UnknownIdError

FOLDER = FilePath(__file__).parent / "templates"
CSP = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
REFRESH_SECONDS = 5
"""Of pages whose jobs are not at their end."""

SHOWN = 50
"""Jobs of a page."""


def moment(text: str, zone: str = "UTC") -> str:
    """An instant (ISO 8601) as people read it, in a time zone: `2026-03-29 03:30:00 CEST`. What is none stays as it is."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    shown = at.astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M:%S %Z")
    return Markup('<time datetime="{}">{}</time>').format(text, shown)


_templates = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
_templates.filters["moment"] = moment

Proven = Annotated[Mapping[str, str], Depends(proven_form)]
Sent = Annotated[Mapping[str, str], Depends(form_of)]

router = APIRouter(include_in_schema=False)


def render(request: Request, template: str, status: int = 200, *, live: bool = False, **values: object) -> HTMLResponse:
    """A page. live: it is loaded anew every few seconds."""
    shared = {"path": request.url.path, "signed_in": COOKIE in request.cookies, "field": FIELD, "proof": proof(request)}
    refresh = REFRESH_SECONDS if live else None
    text = _templates.get_template(template).render(**shared, refresh=refresh, **values)
    return HTMLResponse(text, status, headers={"Content-Security-Policy": CSP})


def refused_page(request: Request, refused: Refused) -> Response:
    """What a browser is shown in the place of a problem document."""
    if refused.problem.status == 401 and request.method == "GET":
        return RedirectResponse("/sign-in", 303)
    answer = render(request, "problem.html", refused.problem.status, problem=refused.problem)
    answer.headers.update(refused.headers)
    return answer


@router.get("/style.css")
def style() -> Response:
    """The style of reports, and what pages need beside it."""
    text = STYLE + (FOLDER / "service.css").read_text()
    return Response(text, media_type="text/css", headers={"Cache-Control": "max-age=3600"})


@router.get("/sign-in")
def sign_in_page(request: Request) -> Response:
    return render(request, "sign_in.html", wrong=False)


@router.post("/sign-in")
def signed_in(request: Request, form: Sent) -> Response:
    answer = RedirectResponse("/", 303)
    try:
        sign_in(request, answer, form.get("token", "").strip())
    except Refused as refused:
        if refused.problem.status != 401:
            raise
        return render(request, "sign_in.html", 401, wrong=True)
    return answer


@router.post("/sign-out")
def signed_out(form: Proven) -> Response:
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/")
def jobs_page(
    request: Request,
    service: Context,
    who: Person,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    every = service.jobs.all()
    seen = [job for job in every if who.sees(job.record.tenant) and job.listed(None)]
    shown, following = page(seen, cursor, SHOWN)
    waiting = [id for id in queue_of(every, service.jobs.limits())["queue"] if id in {job.id for job in seen}]
    names = {job.id: job.record.name for job in seen}
    live = any(not job.state.terminal for job in shown)
    return render(
        request,
        "jobs.html",
        live=live,
        jobs=[facts(job) for job in shown],
        counts=counts(seen),
        queue=[(id, names[id]) for id in waiting],
        next=following,
    )


@router.get("/jobs/{id}")
def job_page(request: Request, service: Context, who: Person, id: str) -> Response:
    job = find_job(service, who, id)
    try:
        progress, away = progress_of(service, job), False
    except StorageError:  # of the output; the job store has answered
        progress, away = None, True
    return render(
        request,
        "job.html",
        live=not job.state.terminal,
        job={**facts(job), "obstacle": obstacle_of(service.jobs, job)},
        terminal=job.state.terminal,
        history=history(job),
        progress=progress,
        away=away,
        log=last_lines(service, job),
        artifact=artifact_path(service, job),
        service=str(request.base_url),
        may_cancel=who.role.rank >= Role.SUBMITTER.rank,
    )


@router.post("/jobs/{id}/cancel")
def cancelled(service: Context, who: Person, form: Proven, id: str) -> Response:
    require(who, Role.SUBMITTER)
    cancel(service.jobs, find_job(service, who, id).id, f"by {who.name}")
    return RedirectResponse(f"/jobs/{id}", 303)


@router.get("/batches")
def batches_page(request: Request, service: Context, who: Person) -> Response:
    found = visible_batches(service, who)
    live = any(not batch.state.terminal for batch in found)
    return render(request, "batches.html", live=live, batches=[batch_facts(batch) for batch in reversed(found)])


@router.get("/batches/{id}")
def batch_page(request: Request, service: Context, who: Person, id: str) -> Response:
    batch = find_batch(service, who, id)
    plots = Markup(batch_sections(summary(batch, service.roots.contains)))
    return render(
        request,
        "batch.html",
        live=not batch.state.terminal,
        batch=batch_facts(batch),
        jobs=[facts(job) for job in batch.jobs],
        plots=plots,
    )


@router.get("/schedules")
def schedules_page(request: Request, service: Context, who: Person) -> Response:
    now = service.jobs.store.now()
    found = [schedule_facts(one, now) for one in visible_schedules(service, who)]
    return render(request, "schedules.html", schedules=found)


@router.get("/artifacts/{name}/{id}/report")
def report_page(
    service: Context,
    who: Person,
    name: Annotated[str, Path(pattern=f"^{NAME}$")],
    id: Annotated[str, Path(pattern=f"^{ID}$")],
) -> Response:
    """An artifact's own report, in a sandbox: whoever may write artifacts wrote it."""
    found = find_artifact(service, who, name, id)
    entry = found.document.files.get(REPORT_PAGE)
    if entry is None:
        raise UnknownIdError(REPORT_PAGE)
    text = found.store.read(REPORT_PAGE, sha256=entry.sha256)
    return HTMLResponse(text, headers={"Content-Security-Policy": f"{POLICY}; sandbox; frame-ancestors 'none'"})


Maker = Callable[[Service, Principal, Body, Order], object]
MAKERS: Mapping[str, Maker] = {"job": create_job, "batch": create_batch, "schedule": create_schedule}
PLACES = {"job": "/jobs", "batch": "/batches", "schedule": "/schedules"}


@router.get("/submit")
def submit_page(request: Request, who: Person) -> Response:
    require(who, Role.SUBMITTER)
    return render(request, "submit.html", kinds=list(MAKERS), kind="job", text="", problems={}, source=[])


@router.post("/submit")
def submitted(request: Request, service: Context, who: Person, form: Proven) -> Response:
    require(who, Role.SUBMITTER)
    kind, text = form.get("kind", "job"), form.get("manifest", "").replace("\r\n", "\n")
    if kind not in MAKERS:
        raise Refused(422, "kind", [f"form.kind: expected {', '.join(MAKERS)}"])
    body = Body(text.encode(), "manifest.yaml")
    try:
        MAKERS[kind](service, who, body, Order(who.tenant))
    except Refused as refused:
        if refused.problem.status not in (409, 422):
            raise
        found = placed(text, list(refused.problem.errors)) or {0: [refused.problem.detail]}
        source = list(enumerate(text.split("\n"), 1))
        status = refused.problem.status
        return render(
            request, "submit.html", status, kinds=list(MAKERS), kind=kind, text=text, problems=found, source=source
        )
    return RedirectResponse("/" if kind == "job" else PLACES[kind], 303)
