"""Who looks at a page: a token kept in a cookie that no script sees and no other site sends; and forms that only we send.

Only pages read the cookie. The API reads the Authorization header alone, which no form of another site can set.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import Depends, Request, Response

from counterweight.pipeline.manifest.document import MAX_BYTES
from counterweight.pipeline.service.access import admitted, require
from counterweight.pipeline.service.bodies import media_type, read_bounded
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.tokens import Principal, Role

COOKIE = "counterweight_token"
SECONDS = 12 * 3600
FORM = "application/x-www-form-urlencoded"
MAX_FIELDS = 10
FIELD = "csrf"
"""Of a form: shows that one of our pages, for this token, made it."""


async def person(request: Request) -> Principal:
    """Whose cookie it is; raises as `admitted`, and 403 for a token that may see no page."""
    return require(admitted(request, request.cookies.get(COOKIE)), Role.VIEWER)


Person = Annotated[Principal, Depends(person)]


def proof(request: Request) -> str:
    """What forms for this session hold. It follows from the token, so every instance knows it."""
    return hmac.new(request.cookies.get(COOKIE, "").encode(), b"form", hashlib.sha256).hexdigest()


async def form_of(request: Request) -> Mapping[str, str]:
    """The fields of a form that was sent by a page of this service: 403 where another site sent it."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    elsewhere = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if site not in (None, "same-origin", "none") or elsewhere:
        raise Refused(403, "a form from another site")
    if media_type(request) != FORM:
        raise Refused(415, f"expected {FORM}")
    data = await read_bounded(request, 4 * MAX_BYTES)  # a character may be written as %xx
    try:
        fields = parse_qs(data.decode("ascii"), max_num_fields=MAX_FIELDS, keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise Refused(400, "no form") from error
    if any(len(values) > 1 for values in fields.values()):
        raise Refused(400, "a field that is there twice")
    return {name: values[0] for name, values in fields.items()}


async def proven_form(request: Request, who: Person) -> Mapping[str, str]:
    """As `form_of`, of whoever is signed in: 403 without the session's own proof."""
    fields = await form_of(request)
    if not hmac.compare_digest(fields.get(FIELD, "").encode(), proof(request).encode()):
        raise Refused(403, "the form is not of this session: expected it to be sent from its page")
    return fields


def sign_in(request: Request, response: Response, token: str) -> None:
    """Keeps a token; raises as `admitted` for nobody's."""
    admitted(request, token)
    response.set_cookie(
        COOKIE, token, max_age=SECONDS, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
