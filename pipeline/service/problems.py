"""What a refused or failed request is answered with: problem documents of RFC 9457."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from counterweight.pipeline.redaction import redacted
from counterweight.workers.config import Config
from counterweight.workers.errors import CounterweightError, SurroundingsError, UnknownIdError

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5

_FIELD = re.compile(r"(?P<field>[A-Za-z0-9_$'\[\]./-]{1,300}): (?P<detail>.+)", re.DOTALL)


class FieldProblem(Config):
    """What is wrong with one field."""

    field: str
    """Its path: `spec.recipe.weights.bits` in a manifest, `query.limit` in a request; empty: the text as a whole."""
    detail: str
    """Its value and what was expected."""


class Problem(Config):
    """A problem document (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: Sequence[FieldProblem] = Field(default_factory=tuple)


class Refused(Exception):
    """A request that is not answered with what it asked for. lines: `field: what is wrong` each."""

    def __init__(
        self, status: int, detail: str, lines: Sequence[str] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.headers = dict(headers or {})
        self.problem = Problem(
            title=HTTPStatus(status).phrase,
            status=status,
            detail=redacted(detail),
            errors=tuple(_field(redacted(line)) for line in lines),
        )


def _field(line: str) -> FieldProblem:
    match = _FIELD.fullmatch(line)
    return FieldProblem(field="", detail=line) if match is None else FieldProblem(**match.groupdict())


def invalid(error: CounterweightError) -> Refused:
    """The request's own text is wrong, each line of the error in its own way."""
    lines = str(error).splitlines()
    return Refused(422, lines[0] if len(lines) == 1 else f"{len(lines)} problems", lines)


def answer(refused: Refused) -> JSONResponse:
    """The refusal as a response."""
    problem = refused.problem
    return JSONResponse(problem.model_dump(mode="json"), problem.status, headers=refused.headers, media_type=MEDIA_TYPE)


def refusal_of(error: Exception) -> Refused:
    """What any error of a request is to whoever asked. An error of ours says nothing of itself: the log has it."""
    match error:
        case Refused():
            return error
        case RequestValidationError():
            lines = [f"{'.'.join(map(str, one['loc']))[:100]}: {one['msg'][:200]}" for one in error.errors()[:20]]
            return Refused(422, "the request's parameters", lines)
        case HTTPException(status_code=status, headers=headers):
            return Refused(status, HTTPStatus(status).description or HTTPStatus(status).phrase, (), headers)
        case UnknownIdError():
            return Refused(404, "there is no such thing, or it is not yours")
        case SurroundingsError():
            return Refused(
                503, "the job store or an artifact cannot be read now", (), {"Retry-After": str(RETRY_SECONDS)}
            )
        case _:  # what users may get wrong is caught where it is read
            return Refused(500, "the service failed; its log says how")
