"""What names an object: the rules for keys, and what a storage URI says.

`file:` URIs are percent-decoded (RFC 8089, so `Path.as_uri()` works); `s3:` URIs are taken literally, as
the AWS command line does. Roots are given by the user and trusted; keys may come from a checkpoint's index
or a record, and are not. A key cannot climb out of its root: `..` is refused, and so are links below a `file:`
root that lead out of it (`workers.storage.regular`).
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from urllib.parse import unquote

from counterweight.workers.errors import RequestError

# Names that a store uses for files not yet visible; never listed and never accepted as a key.
TEMPORARY_PREFIX = ".counterweight-tmp-"

MAX_KEY_BYTES = 1024  # S3: the longest key, in UTF-8, root prefix included
MAX_SEGMENT_BYTES = 255  # Linux: NAME_MAX

EXPECTED_URI = "expected file:/absolute/path or s3://bucket/prefix"


def check_key(key: str) -> str:
    """Returns `key` when it is one: segments joined by '/', none of them empty, '.' or '..', no backslash,
    no control character, at most 255 bytes of UTF-8 a segment and 1024 in all. Otherwise raises
    `RequestError`."""
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise _bad_key(key, f"segment {segment!r}")
        if segment.startswith(TEMPORARY_PREFIX):
            raise _bad_key(key, f"{TEMPORARY_PREFIX!r} marks files that are being written")
        if len(_utf8(key, segment)) > MAX_SEGMENT_BYTES:
            raise _bad_key(key, f"a segment longer than {MAX_SEGMENT_BYTES} bytes")
    if len(_utf8(key, key)) > MAX_KEY_BYTES:
        raise _bad_key(key, f"longer than {MAX_KEY_BYTES} bytes")
    return key


def check_prefix(prefix: str) -> str:
    """Returns `prefix` when some valid key could begin with it up to its last '/'; otherwise raises
    `RequestError`."""
    directory, slash, rest = prefix.rpartition("/")
    if slash:
        check_key(directory)
    _utf8(prefix, rest)
    return prefix


def is_key(name: str) -> bool:
    """Whether `name` is a valid key."""
    try:
        check_key(name)
    except RequestError:
        return False
    return True


def check_range(uri: str, start: int, length: int) -> None:
    """Raises `RequestError` unless both are whole numbers from 0."""
    if start < 0 or length < 0:
        raise RequestError(f"read {uri}: range of {length} bytes from {start}: expected both to be at least 0")


def _utf8(key: str, part: str) -> bytes:
    for character in part:
        if character == "\\" or unicodedata.category(character) in ("Cc", "Cs"):
            raise _bad_key(key, f"character {character!r}")
    return part.encode()


def _bad_key(key: str, problem: str) -> RequestError:
    return RequestError(f"object key {key[:200]!r}: {problem}: expected a relative path such as 'a/b.json'")


def file_root(uri: str) -> Path | None:
    """The absolute path that a `file:` URI names, or None for another scheme. Raises `RequestError`."""
    if not uri.startswith("file:"):
        return None
    rest = uri.removeprefix("file:")
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host:
            raise RequestError(f"storage URI {uri!r}: names the host {host!r}: {EXPECTED_URI}")
        rest = slash + path
    if not rest.startswith("/"):
        raise RequestError(f"storage URI {uri!r}: a relative path: {EXPECTED_URI}")
    path = unquote(rest, errors="surrogateescape")
    if "\0" in path:
        raise RequestError(f"storage URI {uri!r}: holds a NUL character: {EXPECTED_URI}")
    return Path("/" + path.lstrip("/"))  # POSIX gives a leading '//' a meaning of its own


def s3_root(uri: str) -> tuple[str, str] | None:
    """The bucket and the prefix (without slashes at its ends) that an `s3:` URI names, or None for another
    scheme. Raises `RequestError`."""
    if not uri.startswith("s3:"):
        return None
    if not uri.startswith("s3://"):
        raise RequestError(f"storage URI {uri!r}: {EXPECTED_URI}")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket or not all(c.isascii() and (c.isalnum() or c in "-._") for c in bucket):
        raise RequestError(f"storage URI {uri!r}: bucket {bucket!r}: expected letters, digits, '-', '.' and '_'")
    prefix = prefix.removesuffix("/")
    if prefix:
        check_key(prefix)
    return bucket, prefix


def split_uri(uri: str) -> tuple[str, str]:
    """An object's URI as the root URI of the store that holds it (its parent) and its key there (one
    segment).

    Raises `RequestError` when the URI names no object: another scheme, a bare bucket, a trailing slash.
    """
    path = file_root(uri)
    if path is not None:
        if uri.endswith("/") or path.name == "":
            raise RequestError(f"storage URI {uri!r}: names a directory, expected an object")
        return path.parent.as_uri(), check_key(path.name)
    place = s3_root(uri)
    if place is None:
        raise RequestError(f"storage URI {uri!r}: {EXPECTED_URI}")
    bucket, prefix = place
    if uri.endswith("/") or not prefix:
        raise RequestError(f"storage URI {uri!r}: names a bucket or a prefix, expected an object")
    parent, _, name = prefix.rpartition("/")
    return f"s3://{bucket}/{parent}".removesuffix("/"), name
