"""The bodies of requests: read whole, within a bound, by whoever may send one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Annotated

from fastapi import Depends, Request

from counterweight.pipeline.manifest.document import MAX_BYTES
from counterweight.pipeline.service.access import Submitter
from counterweight.pipeline.service.problems import Refused

JSON = "application/json"
YAML = ("application/yaml", "application/x-yaml", "text/yaml")


@dataclass(frozen=True, slots=True)
class Body:
    """A manifest as it came. name: what errors call it; its end says how it is read."""

    data: bytes
    name: str


async def read_bounded(request: Request, most: int = MAX_BYTES) -> bytes:
    """The request's body; 413, as soon as that is known, beyond `most` bytes; 415 for one that is compressed."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "a body with a Content-Encoding: expected it plain")
    too_large = Refused(413, f"a body of more than {most} bytes", (), {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal():
        raise Refused(400, "Content-Length: expected a number")
    if len(length) > 12 or int(length) > most:
        raise too_large
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise too_large
    return bytes(data)


def media_type(request: Request) -> str:
    """Of the body, in lower case; 415 for a character set that is not UTF-8, and for a header that is there twice."""
    values = request.headers.getlist("content-type")
    if len(values) != 1:
        raise Refused(415, "Content-Type: expected it once")
    header = Message()
    header["content-type"] = values[0]
    if str(header.get_param("charset", "utf-8")).lower() not in ("utf-8", "utf8"):
        raise Refused(415, "Content-Type: expected charset=utf-8")
    return header.get_content_type()


async def _manifest(request: Request, principal: Submitter) -> Body:
    kind = media_type(request)
    if kind != JSON and kind not in YAML:
        raise Refused(415, f"Content-Type {kind[:100]!r}: expected {JSON} or {YAML[0]}")
    return Body(await read_bounded(request), "manifest.json" if kind == JSON else "manifest.yaml")


ManifestBody = Annotated[Body, Depends(_manifest)]
"""For who may submit; others are refused before a byte of it is read."""


def documented(schema: Mapping[str, object]) -> dict[str, object]:
    """For a route's `openapi_extra`: the body is such a document, as JSON or as YAML."""
    content = {kind: {"schema": schema} for kind in (JSON, YAML[0])}
    return {"requestBody": {"required": True, "content": content}}
