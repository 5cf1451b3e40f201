"""From a URI to a store."""

from __future__ import annotations

from counterweight.workers.errors import RequestError
from counterweight.workers.storage.base import ObjectStore
from counterweight.workers.storage.names import EXPECTED_URI, file_root, s3_root


def open_store(uri: str) -> ObjectStore:
    """The store at a root URI. Opening touches neither disk nor network. Raises `RequestError` for other
    schemes."""
    # Each backend is imported when asked for: boto3 costs a third of a second that file: users need not pay.
    root = file_root(uri)
    if root is not None:
        from counterweight.workers.storage.file import FileStore

        return FileStore(root)
    if s3_root(uri) is not None:
        from counterweight.workers.storage.s3 import S3Store

        return S3Store(uri)
    raise RequestError(f"storage URI {uri!r}: {EXPECTED_URI}")
