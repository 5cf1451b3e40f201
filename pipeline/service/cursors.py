"""Pages of a list that grows while it is read: a cursor names the last item of a page, not a number of items."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import datetime

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.service.problems import Refused

Position = tuple[datetime, str]


def page(jobs: Sequence[Job], cursor: str | None, limit: int) -> tuple[list[Job], str | None]:
    """The jobs behind a cursor, last submitted first, at most `limit` of them; and the cursor of the next page, None where
    there is none. 422 for no cursor."""
    ordered = sorted(jobs, key=_position, reverse=True)
    if cursor is not None:
        before = _parse(cursor)
        ordered = [job for job in ordered if _position(job) < before]
    shown = ordered[:limit]
    return shown, _text(shown[-1]) if len(ordered) > limit else None


def _position(job: Job) -> Position:
    return job.submitted, job.id


def _text(job: Job) -> str:
    return base64.urlsafe_b64encode(f"{job.submitted.isoformat()} {job.id}".encode()).decode().rstrip("=")


def _parse(cursor: str) -> Position:
    try:
        at, _, id = (
            base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode().partition(" ")
        )
        submitted = datetime.fromisoformat(at)
        if submitted.tzinfo is None:
            raise ValueError("no time zone")
    except (ValueError, binascii.Error) as error:
        raise Refused(422, "cursor", ["query.cursor: expected `next` of the page before"]) from error
    return submitted, id
