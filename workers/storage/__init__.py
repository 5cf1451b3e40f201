"""Object storage: `file:` and `s3:` behind one narrow interface."""

from counterweight.workers.storage.base import (
    ObjectInfo,
    ObjectStore,
    StaleWrite,
    Writer,
    Written,
    sha256_hex,
    stream_sha256,
)
from counterweight.workers.storage.fetch import fetch
from counterweight.workers.storage.names import check_key, split_uri
from counterweight.workers.storage.opening import open_named, open_store
from counterweight.workers.storage.probe import probe

__all__ = [
    "ObjectInfo",
    "ObjectStore",
    "StaleWrite",
    "Writer",
    "Written",
    "check_key",
    "fetch",
    "open_named",
    "open_store",
    "probe",
    "sha256_hex",
    "split_uri",
    "stream_sha256",
]
