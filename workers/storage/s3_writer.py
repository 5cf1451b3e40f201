"""Writes one S3 object of any size in bounded memory, as a multipart upload that overlaps with its
producer."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from botocore.exceptions import ClientError

from counterweight.workers.errors import RequestError, StorageError
from counterweight.workers.storage.base import Writer
from counterweight.workers.storage.s3_client import Connection, code_of, s3_errors

MAX_PARTS = 10_000  # S3's limit

_ATTEMPT = "counterweight-attempt"


def attempt_metadata(attempt: str) -> dict[str, str]:
    """Object metadata that carries a call's nonce, by which the call knows its object again."""
    return {_ATTEMPT: attempt}


def attempt_of(head: Mapping[str, Any]) -> str:
    """The nonce in the answer to a HEAD request; '' where there is none."""
    metadata: Mapping[str, str] = head.get("Metadata") or {}
    # Some servers change the case of metadata names.
    return next((value for name, value in metadata.items() if name.lower() == _ATTEMPT), "")


class MultipartWriter(Writer):
    """A `Writer` that sends one PUT when everything fits one part, and parts of equal size otherwise.

    Holds at most `parts_in_flight + 1` parts; `write` waits when all of them are under way. A writer that
    is killed leaves an open upload, invisible to readers; `abort_stale_writes` removes it.
    """

    def __init__(self, connection: Connection, bucket: str, name: str, sha256: str | None = None) -> None:
        super().__init__(f"s3://{bucket}/{name}", sha256)
        self._s3 = connection.client
        self._place = {"Bucket": bucket, "Key": name}
        self._settings = connection.settings
        self._attempt = uuid.uuid4().hex
        self._buffer = bytearray()
        self._upload: str | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._pending: deque[Future[dict[str, object]]] = deque()
        self._parts: list[dict[str, object]] = []

    def _append(self, view: memoryview) -> None:
        while view:
            room = self._settings.part_size - len(self._buffer)
            if room == 0:
                self._send_part()
                continue
            self._buffer += view[:room]
            view = view[room:]

    def _send_part(self) -> None:
        number = len(self._parts) + len(self._pending) + 1
        if number > MAX_PARTS:
            limit = MAX_PARTS * self._settings.part_size
            raise RequestError(f"write {self.uri}: larger than {limit} bytes, the most in {MAX_PARTS} parts")
        if self._upload is None or self._threads is None:
            with s3_errors("write", self.uri):
                metadata = attempt_metadata(self._attempt)
                answer = self._s3().create_multipart_upload(**self._place, Metadata=metadata)
            self._upload = str(answer["UploadId"])
            self._threads = ThreadPoolExecutor(self._settings.parts_in_flight, "upload")
        if len(self._pending) == self._settings.parts_in_flight:
            self._parts.append(self._pending.popleft().result())
        # The buffer itself travels, uncopied; the next part gets a new one.
        part, self._buffer = self._buffer, bytearray()
        self._pending.append(self._threads.submit(self._put_part, self._upload, number, part))

    def _put_part(self, upload: str, number: int, part: bytearray) -> dict[str, object]:
        with s3_errors(f"write part {number} of", self.uri):
            answer = self._s3().upload_part(**self._place, UploadId=upload, PartNumber=number, Body=part)
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
        checksums.pop("ChecksumType", None)
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    def _publish(self) -> None:
        if self._upload is None:
            with s3_errors("write", self.uri):
                metadata = attempt_metadata(self._attempt)
                self._s3().put_object(**self._place, Body=self._buffer, Metadata=metadata)
            return
        self._send_part()
        while self._pending:
            self._parts.append(self._pending.popleft().result())
        try:
            with s3_errors("write", self.uri):
                self._s3().complete_multipart_upload(
                    **self._place, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
                )
        except StorageError:
            # An acknowledgement lost on the way: boto3 asks again, and the upload is no more.
            if not self._is_ours():
                raise
        self._stop_threads()

    def _is_ours(self) -> bool:
        try:
            with s3_errors("write", self.uri):
                head = self._s3().head_object(**self._place)
        except StorageError:
            return False
        return attempt_of(head) == self._attempt and int(head["ContentLength"]) == self._size

    def _discard(self) -> None:
        self._buffer = bytearray()
        # A part still under way when the upload is aborted may survive it: first wait, then abort.
        self._stop_threads()
        if self._upload is None:
            return
        try:
            with s3_errors("abort writing", self.uri):
                self._s3().abort_multipart_upload(**self._place, UploadId=self._upload)
        except StorageError as error:
            if not isinstance(error.__cause__, ClientError) or code_of(error.__cause__) != "NoSuchUpload":
                raise

    def _stop_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        self._pending.clear()
