"""Routes about published artifacts."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from counterweight.pipeline.artifact.document import ArtifactDocument
from counterweight.pipeline.artifact.tags import TAG, MovedError, move, put
from counterweight.pipeline.service.access import Context, Submitter, Viewer
from counterweight.pipeline.service.artifacts import ID, LATEST, NAME, Found, all_tags, find_artifact, pieces, span
from counterweight.pipeline.service.models import FileUrl, FileUrls, TagList
from counterweight.pipeline.service.problems import Refused, invalid
from counterweight.workers.errors import RequestError
from counterweight.workers.storage import ObjectStore

Name = Annotated[str, Path(pattern=f"^{NAME}$", description="Name of a job.")]
Id = Annotated[str, Path(pattern=f"^({ID}|{LATEST}|{TAG})$", description="Id of an artifact, `latest`, or a tag.")]
Tag = Annotated[str, Path(pattern=f"^{TAG}$", description="Neither `latest` nor an id.")]
Expected = Annotated[
    str | None,
    Header(
        alias="If-Match",
        pattern=f'^"{ID}"$',
        description="The id, in quotes, of the artifact that the tag is on; 412 where it is elsewhere.",
    ),
]
New = Annotated[
    Literal["*"] | None,
    Header(alias="If-None-Match", description="`*`: only where the tag is on nothing; 412 where it is."),
]
Seconds = Annotated[int, Query(ge=60, le=43_200, description="That presigned URLs hold.")]

BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

router = APIRouter(tags=["artifacts"])


@router.get("/artifacts/{name}/tags", response_model=TagList)
def list_tags(service: Context, principal: Viewer, name: Name) -> TagList:
    """List the tags of a name, and which artifacts they are on."""
    return TagList(name=name, tags=all_tags(service, principal, name))


@router.put("/artifacts/{name}/tags/{tag}", response_model=TagList)
def put_tag(
    service: Context,
    principal: Submitter,
    name: Name,
    tag: Tag,
    id: Annotated[str, Query(pattern=f"^{ID}$", description="Of the artifact.")],
    expected: Expected = None,
    new: New = None,
) -> TagList:
    """Put a tag on an artifact: wherever it is, or only from where it is expected."""
    _move(find_artifact(service, principal, name, id).names, tag, id, expected, new)
    return list_tags(service, principal, name)


@router.delete("/artifacts/{name}/tags/{tag}", response_model=TagList)
def delete_tag(service: Context, principal: Submitter, name: Name, tag: Tag, expected: Expected = None) -> TagList:
    """Take a tag away: wherever it is, or only from where it is expected."""
    _move(find_artifact(service, principal, name, tag).names, tag, None, expected, None)
    return list_tags(service, principal, name)


def _move(names: ObjectStore, tag: str, to: str | None, expected: str | None, new: str | None) -> None:
    """Refuses what cannot be a tag with 422, and with 412 what is not where it was expected."""
    try:
        if expected is None and new is None:
            put(names, tag, to)
        else:
            move(names, tag, to, before=None if expected is None else expected.strip('"'))
    except MovedError as error:
        raise Refused(412, str(error)) from error
    except RequestError as error:
        raise invalid(error) from error


@router.get("/artifacts/{name}/{id}", response_model=ArtifactDocument)
def get_artifact(service: Context, principal: Viewer, name: Name, id: Id) -> ArtifactDocument:
    """Give an artifact's artifact.json: what it was made from, its figures, its files."""
    return find_artifact(service, principal, name, id).document


@router.get("/artifacts/{name}/{id}/urls", response_model=FileUrls)
def get_urls(service: Context, principal: Viewer, name: Name, id: Id, seconds: Seconds = 3600) -> FileUrls:
    """Give a URL for each file: presigned where the artifact is in S3, for whoever has no credentials there; otherwise of this
    service, which wants the token."""
    found = find_artifact(service, principal, name, id)
    return FileUrls(
        name=found.document.name,
        id=found.document.id,
        expires_in=seconds,
        files={path: _url(found, path, seconds) for path in found.files},
    )


def _url(found: Found, path: str, seconds: int) -> FileUrl:
    presigned, entry = found.store.presigned(path, seconds), found.files[path]
    document = found.document
    return FileUrl(
        url=presigned or f"/v1/artifacts/{document.name}/{document.id}/files/{quote(path)}",
        token=presigned is None,
        size=found.size(path),
        sha256=None if entry is None else entry.sha256,
    )


@router.get(
    "/artifacts/{name}/{id}/files/{path:path}",
    response_class=Response,
    responses={
        200: {**BYTES, "description": "The file."},
        206: {**BYTES, "description": "The range of it that was asked for."},
        307: {"description": "To its presigned URL, where the artifact is in S3."},
    },
)
def get_file(
    service: Context,
    principal: Viewer,
    name: Name,
    id: Id,
    path: Annotated[str, Path(max_length=1024, description="One of the artifact's files.")],
    range_: Annotated[str | None, Header(alias="Range", description="A single range of bytes.")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
) -> Response:
    """Give a file of an artifact, or a range of it."""
    found = find_artifact(service, principal, name, id)
    size = found.size(path)
    presigned = found.store.presigned(path, 3600)
    if presigned is not None:
        return RedirectResponse(presigned, 307)
    entry = found.files[path]
    tag = None if entry is None else f'"{entry.sha256}"'
    chosen = span(range_, size) if if_range in (None, tag) else None
    start, stop = chosen or (0, size)
    headers = {"Accept-Ranges": "bytes", "Content-Length": str(stop - start), "Content-Disposition": "attachment"}
    if tag is not None:
        headers["ETag"] = tag
    if chosen is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return StreamingResponse(
        pieces(found.store, path, start, stop),
        206 if chosen is not None else 200,
        headers=headers,
        media_type="application/octet-stream",
    )
