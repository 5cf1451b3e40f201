"""From a URI to a store."""

from __future__ import annotations

import os
from pathlib import Path

from counterweight.workers.errors import RequestError
from counterweight.workers.storage.base import ObjectStore
from counterweight.workers.storage.names import EXPECTED_URI, file_root, s3_root, split_uri


def open_store(uri: str, *, waits: bool = True) -> ObjectStore:
    """The store at a root URI. Opening touches neither disk nor network. waits: whether its requests wait for a server that is
    away. Raises `RequestError` for other schemes."""
    # Each backend is imported when asked for: boto3 costs a third of a second that file: users need not pay.
    root = file_root(uri)
    if root is not None:
        from counterweight.workers.storage.file import FileStore

        return FileStore(root)
    if s3_root(uri) is not None:
        from counterweight.workers.storage.s3 import S3Store
        from counterweight.workers.storage.s3_client import S3Settings

        return S3Store(uri) if waits else S3Store(uri, S3Settings(outage_seconds=0, total_max_attempts=2))
    raise RequestError(f"storage URI {uri!r}: {EXPECTED_URI}")


def open_named(uri: str) -> tuple[ObjectStore, str]:
    """The store that holds the object which somebody names by its own URI, and its key there. A file may be named by a link:
    whoever names it says where it lies. Raises `RequestError`."""
    path = file_root(uri)
    root, key = split_uri(uri if path is None or uri.endswith("/") else Path(os.path.realpath(path)).as_uri())
    return open_store(root), key
