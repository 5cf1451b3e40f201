"""Changes of the limits, as the command line has them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import ValidationError

from counterweight.pipeline.jobs.queue import Limits
from counterweight.pipeline.jobs.record import TENANT
from counterweight.workers.config import first_problem
from counterweight.workers.errors import RequestError

NONE = -1
"""Takes a bound away."""

_TENANT = re.compile(rf"({TENANT})=(-1|[0-9]{{1,6}})")


def changed(limits: Limits, concurrency: int | None, per_tenant: int | None, tenants: Sequence[str]) -> Limits:
    """The limits with other bounds; None: as it is. tenants: NAME=JOBS each. RequestError."""
    bounds = dict(limits.tenants)
    for text in tenants:
        match = _TENANT.fullmatch(text)
        if match is None:
            raise RequestError(f"--tenant {text[:100]!r}: expected NAME=JOBS, such as research=4")
        bounds[match[1]] = int(match[3])
    document = {
        "concurrency": limits.concurrency if concurrency is None else _bound(concurrency),
        "per_tenant": limits.per_tenant if per_tenant is None else _bound(per_tenant),
        "tenants": {name: bound for name, bound in bounds.items() if bound != NONE},
    }
    try:
        return Limits.model_validate(document)
    except ValidationError as error:
        raise RequestError(f"limits: {first_problem(error)}") from error


def _bound(value: int) -> int | None:
    return None if value == NONE else value
