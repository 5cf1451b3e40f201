"""An artifact as a service gives it: https://host/v1/artifacts/NAME/ID, read by whoever has a token of the service and no
credentials of its store. Files come from presigned URLs where the store has them, otherwise through the service.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from pydantic import ValidationError

from counterweight.pipeline.artifact.document import DOCUMENT
from counterweight.pipeline.artifact.reader import MAX_DOCUMENT_BYTES, read_document
from counterweight.pipeline.service.models import FileUrl, FileUrls
from counterweight.workers.config import first_problem
from counterweight.workers.errors import ObjectNotFoundError, RequestError, StorageError

TOKEN = "COUNTERWEIGHT_TOKEN"
"""Environment variable: a token of the service."""

SCHEMES = ("http", "https")
ANSWER_SECONDS = 60.0
TRIES = 5
"""Of one request, with pauses of 1, 2, 4 and 8 seconds between them, or as long as the service asks for."""

MAX_PAUSE = 60.0


def is_remote(uri: str) -> bool:
    """Whether an artifact is named by the URL of a service, rather than by that of its store."""
    return urlsplit(uri).scheme in SCHEMES


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The token is for the service alone, and whoever answers may name any other place."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request. token: whether it bears the service's. span: the first byte and how many; None: all, at most `most`."""

    url: str
    token: bool
    span: tuple[int, int] | None = None
    most: int = MAX_DOCUMENT_BYTES


class RemoteArtifact:
    """Reads the files of an artifact; several threads may at once. token: None for that of the environment.

    Raises RequestError for a URL that names no artifact and for a token that may not read it, StorageError when the service or
    the store behind it fails.
    """

    def __init__(self, uri: str, token: str | None = None) -> None:
        self._token = os.environ.get(TOKEN) if token is None else token
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._uri = uri.rstrip("/")
        self._urls = self._told()
        # `latest` and tags move: from now on it is this one.
        self._uri = urljoin(f"{self._uri}/", f"../{self._urls.id}")
        self.document = read_document(self)
        self.text = self.read_bounded(DOCUMENT, MAX_DOCUMENT_BYTES)

    def uri_of(self, key: str) -> str:
        """For people."""
        return f"{self._uri}/files/{key}"

    def size(self, key: str) -> int:
        """ObjectNotFoundError for what is none of its files."""
        return self._url(key).size

    def read_bounded(self, key: str, most: int) -> bytes:
        """The whole file, of at most `most` bytes; RequestError for a larger one."""
        size = self.size(key)
        if size > most:
            raise RequestError(f"{self.uri_of(key)}: {size} bytes, expected at most {most}")
        return self.read_range(key, 0, size)

    def stream(self, key: str, *, start: int = 0) -> Iterator[bytes]:
        """All from `start` on."""
        yield self.read_range(key, start, self.size(key) - start)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on."""
        if length == 0:
            return b""
        file = self._url(key)
        try:
            return self._read(self._wanted(file, (start, length)))
        except _ExpiredError:
            self._urls = self._told()
            return self._read(self._wanted(self._url(key), (start, length)))

    def _wanted(self, file: FileUrl, span: tuple[int, int]) -> _Wanted:
        url = urljoin(self._uri, file.url) if file.token else file.url
        return _Wanted(url, file.token, span)

    def _url(self, key: str) -> FileUrl:
        if key not in self._urls.files:
            raise ObjectNotFoundError(f"read {self.uri_of(key)}: no such file of the artifact")
        return self._urls.files[key]

    def _told(self) -> FileUrls:
        """What the service says of all files."""
        url = f"{self._uri}/urls"
        try:
            return FileUrls.model_validate_json(self._read(_Wanted(url, token=True)))
        except ValidationError as error:
            raise RequestError(f"{url}: no artifact of a service: {first_problem(error)}") from error

    def _read(self, wanted: _Wanted) -> bytes:
        """The body of an answer, tried again where that may help."""
        if urlsplit(wanted.url).scheme not in SCHEMES:
            raise RequestError(f"{self._uri}: {_place(wanted.url)}: expected http:// or https://")
        for tries in range(TRIES):
            try:
                return self._answer(wanted)
            except urllib.error.HTTPError as error:
                cause, wait = f"{error.code} {error.reason}", _asked(error.headers.get("Retry-After", ""))
                self._final(wanted, error.code, cause)
            except (OSError, http.client.HTTPException) as error:
                cause, wait = f"{type(error).__name__}: {error}", 0.0
            if tries < TRIES - 1:
                time.sleep(min(max(wait, 2.0**tries), MAX_PAUSE))
        raise StorageError(f"read {_place(wanted.url)}: {cause}, {TRIES} times")

    def _final(self, wanted: _Wanted, status: int, cause: str) -> None:
        """Raises where trying again cannot help."""
        place = f"read {_place(wanted.url)}"
        if not wanted.token and status in (400, 401, 403):
            raise _ExpiredError(f"{place}: {cause}")
        if status in (401, 403):
            raise RequestError(f"{place}: {cause}: expected {TOKEN} to be a token of the service that may read it")
        if status == 404:
            raise RequestError(f"{place}: {cause}: expected a published artifact, /v1/artifacts/NAME/ID")
        if status < 500 and status != 429:
            raise StorageError(f"{place}: {cause}")

    def _answer(self, wanted: _Wanted) -> bytes:
        headers = {}
        if wanted.token and self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        if wanted.span is not None:
            start, length = wanted.span
            headers["Range"] = f"bytes={start}-{start + length - 1}"
        request = urllib.request.Request(wanted.url, headers=headers)
        with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
            most = wanted.most if wanted.span is None else wanted.span[1]
            if wanted.span is not None and not str(answer.headers.get("Content-Range", "")).startswith(
                f"bytes {start}-"
            ):
                raise StorageError(f"read {_place(wanted.url)}: the server ignored the range from byte {start}")
            data: bytes = answer.read(most + 1)
        if len(data) > most:
            raise StorageError(f"read {_place(wanted.url)}: more than the {most} bytes that were asked for")
        if wanted.span is not None and len(data) < most:
            raise http.client.IncompleteRead(data, most - len(data))
        return data


class _ExpiredError(StorageError):
    """A presigned URL is refused: it was signed too long ago, or for nobody."""


def _place(url: str) -> str:
    """A URL for people: without its query, which may be a signature."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def _asked(retry_after: str) -> float:
    """Seconds that the server asks to wait."""
    return float(retry_after) if retry_after.isdecimal() else 0.0
