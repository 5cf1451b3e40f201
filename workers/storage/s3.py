"""Objects in S3 and in servers that speak its protocol.

boto3 repeats requests that fail on the way, but three things it cannot do for us (each was seen in front of
a real server): it does not resume a body that breaks off, it reports 412 for a conditional write that it
won itself and whose acknowledgement was lost, and it checks no bytes where the server stores no checksum.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, FlexibleChecksumError

from counterweight.workers.errors import ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage.base import STREAM_CHUNK, ObjectInfo, ObjectStore, StaleWrite, Writer
from counterweight.workers.storage.names import MAX_KEY_BYTES, check_key, check_prefix, check_range, is_key, s3_root
from counterweight.workers.storage.s3_client import (
    TRANSPORT_ERRORS,
    Connection,
    S3Settings,
    code_of,
    s3_errors,
    status_of,
    translated,
)
from counterweight.workers.storage.s3_writer import MultipartWriter, attempt_metadata, attempt_of
from counterweight.workers.storage.traffic import METER

# Of one body; a server that breaks off more often is down, and the task's own retry waits longer.
MAX_RESUMES = 3
_MAX_CONFLICTS = 5
_CONFLICT_PAUSE = 0.1  # seconds, doubled each time


class _Opened(NamedTuple):
    body: Any
    end: int  # offset behind the last byte of this body, counted in the object
    etag: str


class S3Store(ObjectStore):
    """Objects below `s3://bucket/prefix`; the bucket must exist. Raises `RequestError` for a wrong URI."""

    def __init__(self, uri: str, settings: S3Settings | None = None) -> None:
        place = s3_root(uri)
        if place is None:
            raise RequestError(f"storage URI {uri!r}: expected s3://bucket/prefix")
        self._bucket, prefix = place
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self._bucket}/{prefix}".removesuffix("/")
        self._connection = Connection(settings or S3Settings())
        self._bucket_seen = False

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, S3Settings]]:
        return S3Store, (self.uri, self._connection.settings)

    def below(self, key: str) -> S3Store:
        store = S3Store(self.uri_of(key), self._connection.settings)
        store._connection = self._connection
        return store

    def uri_of(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._name(key)}"

    def _name(self, key: str) -> str:
        name = self._prefix + check_key(key)
        if len(name.encode()) > MAX_KEY_BYTES:
            raise RequestError(f"object key {key[:200]!r}: longer than {MAX_KEY_BYTES} bytes below {self.uri}")
        return name

    def _s3(self) -> Any:
        return self._connection.client()

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._name(key)}

    def _read(self, key: str) -> bytes:
        return b"".join(self._bytes(key, 0, None, STREAM_CHUNK))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        uri = self.uri_of(key)
        check_range(uri, start, length)
        if length == 0:  # S3 has no empty ranges
            if start > self.size(key):
                raise StorageError(f"read {uri}: byte {start} is beyond the object's end")
            return b""
        data = b"".join(self._bytes(key, start, start + length, STREAM_CHUNK))
        if len(data) != length:
            raise StorageError(f"read {uri}: up to byte {start + length}, but the object has {start + len(data)} bytes")
        return data

    def stream(self, key: str, *, start: int = 0, chunk: int = STREAM_CHUNK) -> Iterator[bytes]:
        uri = self.uri_of(key)
        check_range(uri, start, 0)
        if start and start >= (size := self.size(key)):  # S3 refuses a range that begins at the end
            if start > size:
                raise StorageError(f"read {uri}: from byte {start}, but the object has {size} bytes")
            return
        yield from self._bytes(key, start, None, chunk)

    def _bytes(self, key: str, start: int, stop: int | None, chunk: int) -> Iterator[bytes]:
        """The bytes of [start, stop), to the object's end at most, over as many as 1 + MAX_RESUMES
        requests."""
        uri = self.uri_of(key)
        position, end, etag, resumes = start, None, None, 0
        while end is None or position < end:
            opened = self._get(key, position, stop)
            if etag is not None and (opened.etag, opened.end) != (etag, end):
                opened.body.close()
                raise StorageError(f"read {uri}: the object was replaced while it was read")
            etag, end = opened.etag, opened.end
            broken: Exception | None = None
            try:
                # Until the empty read behind the last byte, at which botocore compares its checksum.
                while True:
                    try:
                        piece = opened.body.read(chunk)
                    except FlexibleChecksumError as error:
                        raise translated("read", uri, error) from error
                    except TRANSPORT_ERRORS as error:
                        broken = error
                        break
                    if not piece:
                        break
                    position += len(piece)
                    METER.read(len(piece))
                    yield piece
            finally:
                opened.body.close()
            if position < end:
                if resumes == MAX_RESUMES:
                    cause = type(broken).__name__ if broken else "ended early"
                    raise StorageError(
                        f"read {uri}: broke off at byte {position} of {end}, resumed {resumes} times ({cause})"
                    ) from broken
                resumes += 1

    def _get(self, key: str, start: int, stop: int | None) -> _Opened:
        uri = self.uri_of(key)
        ranged = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop else {}
        with s3_errors("read", uri):
            answer = self._s3().get_object(**self._at(key), **ranged)
        # The answer's ETag is compared here; If-Match would ask the server, and several misread its quotes.
        etag, end = str(answer.get("ETag", "")), start + int(answer["ContentLength"])
        if ranged and not str(answer.get("ContentRange", "")).startswith(f"bytes {start}-"):
            answer["Body"].close()
            raise StorageError(f"read {uri}: the server ignored the range from byte {start}")
        return _Opened(answer["Body"], end, etag)

    def presigned(self, key: str, seconds: int) -> str:
        with s3_errors("presign", self.uri_of(key)):
            return str(self._s3().generate_presigned_url("get_object", Params=self._at(key), ExpiresIn=seconds))

    def _head(self, key: str, operation: str) -> dict[str, Any]:
        uri = self.uri_of(key)
        try:
            with s3_errors(operation, uri):
                return dict(self._s3().head_object(**self._at(key)))
        except ObjectNotFoundError:
            self._require_bucket(operation, uri)
            raise

    def _require_bucket(self, operation: str, uri: str) -> None:
        """Raises `RequestError` without the bucket: the answer to HEAD has no body that would tell its
        absence from an object's."""
        if self._bucket_seen:
            return
        try:
            with s3_errors(operation, uri):
                self._s3().head_bucket(Bucket=self._bucket)
        except ObjectNotFoundError as error:
            raise RequestError(f"{operation} {uri}: 404 NoSuchBucket: no bucket {self._bucket!r}") from error
        self._bucket_seen = True

    def size(self, key: str) -> int:
        return int(self._head(key, "read size of")["ContentLength"])

    def exists(self, key: str) -> bool:
        try:
            self._head(key, "look up")
        except ObjectNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes | bytearray | memoryview) -> None:
        # The writer sends one PUT for what fits one part, and otherwise parts that boto3 can repeat singly.
        with self.open_writer(key) as writer:
            writer.write(data)
            writer.commit()

    def create(self, key: str, data: bytes) -> bool:
        uri, attempt = self.uri_of(key), uuid.uuid4().hex
        metadata = attempt_metadata(attempt)
        for conflicts in range(_MAX_CONFLICTS):
            failure: StorageError | RequestError | None = None
            METER.wrote(len(data))
            try:
                self._s3().put_object(**self._at(key), Body=data, IfNoneMatch="*", Metadata=metadata)
                return True
            except (ClientError, *TRANSPORT_ERRORS) as error:
                # 412: the key is taken, perhaps by us: boto3 repeats a PUT whose acknowledgement was lost.
                # 409: writers met inside the server.
                if not isinstance(error, ClientError) or status_of(error) not in (409, 412):
                    failure = translated("create", uri, error)
                    failure.__cause__ = error
            if isinstance(failure, RequestError):
                raise failure
            owner = self._attempt(key)
            if owner is not None:
                return owner == attempt
            if failure is not None:
                raise failure
            if conflicts + 1 < _MAX_CONFLICTS:  # nobody has won yet, or the winner was deleted since
                time.sleep(random.uniform(0.5, 1) * _CONFLICT_PAUSE * 2**conflicts)
        raise StorageError(f"create {uri}: conflicting writers {_MAX_CONFLICTS} times in a row")

    def _attempt(self, key: str) -> str | None:
        """Who created the object: the nonce of the call, '' when it is not of our making; None without an
        object."""
        try:
            return attempt_of(self._head(key, "create"))
        except ObjectNotFoundError:
            return None

    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Writer:
        return MultipartWriter(self._connection, self._bucket, self._name(key), sha256)

    def copy(self, source_key: str, key: str) -> None:
        uri, source_uri = self.uri_of(key), self.uri_of(source_key)
        if source_key == key:  # which S3 refuses
            self._head(key, "copy")
            return
        operation = f"copy {source_uri} to"
        try:
            with s3_errors(operation, uri):
                self._copy(source_key, key, {})
        except ObjectNotFoundError:
            self._require_bucket(operation, uri)
            raise

    def _copy(self, source_key: str, key: str, extra: Mapping[str, object]) -> None:
        part = self._connection.settings.copy_part_size
        transfer = TransferConfig(multipart_threshold=part, multipart_chunksize=part)
        self._s3().copy(CopySource=self._at(source_key), **self._at(key), ExtraArgs=dict(extra), Config=transfer)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        full = self._prefix + check_prefix(prefix)
        with s3_errors("list", f"s3://{self._bucket}/{full}"):
            pages = self._s3().get_paginator("list_objects_v2")
            page_size = self._connection.settings.page_size
            for page in pages.paginate(Bucket=self._bucket, Prefix=full, PaginationConfig={"PageSize": page_size}):
                for item in page.get("Contents", ()):
                    key = str(item["Key"]).removeprefix(self._prefix)
                    if is_key(key):
                        yield ObjectInfo(key=key, size=int(item["Size"]), modified=item["LastModified"])

    def delete(self, key: str) -> None:
        with s3_errors("delete", self.uri_of(key)):
            self._s3().delete_object(**self._at(key))

    def now(self) -> datetime:
        with s3_errors("ask the time of", self.uri):
            return _date(self._s3().list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1))

    def touch(self, key: str, older_than: timedelta) -> bool:
        try:
            head = self._head(key, "touch")
            if _date(head) - head["LastModified"] > older_than:
                # A copy onto itself is allowed where something changes, or is said to.
                kept = {"MetadataDirective": "REPLACE", "Metadata": head.get("Metadata") or {}}
                with s3_errors("touch", self.uri_of(key)):
                    self._copy(key, key, kept)
        except ObjectNotFoundError:
            return False
        return True

    def stale_writes(self, older_than: timedelta) -> Iterator[StaleWrite]:
        with s3_errors("list stale uploads below", self.uri):
            pages = self._s3().get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                now = _date(page)
                for upload in page.get("Uploads", ()):
                    if now - upload["Initiated"] > older_than:
                        key, number = str(upload["Key"]), str(upload["UploadId"])
                        yield StaleWrite(key=key, size=self._uploaded(key, number), upload=number)

    def _uploaded(self, name: str, upload: str) -> int:
        """Bytes in the parts of an open upload."""
        try:
            pages = self._s3().get_paginator("list_parts").paginate(Bucket=self._bucket, Key=name, UploadId=upload)
            return sum(int(part["Size"]) for page in pages for part in page.get("Parts", ()))
        except ClientError as error:
            if code_of(error) != "NoSuchUpload":
                raise
            return 0

    def abort_write(self, stale: StaleWrite) -> bool:
        with s3_errors("abort stale upload of", f"s3://{self._bucket}/{stale.key}"):
            try:
                self._s3().abort_multipart_upload(Bucket=self._bucket, Key=stale.key, UploadId=stale.upload)
            except ClientError as error:
                # Otherwise its writer finished, or another sweep was first.
                if code_of(error) != "NoSuchUpload":
                    raise
                return False
        return True


def _date(answer: Mapping[str, Any]) -> datetime:
    """When the server answered, by its own clock."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
