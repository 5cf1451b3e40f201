"""Tags: names for artifacts that people move, such as `production`. `<output>/<name>@production` is the artifact that it is on.

<output>/<name>/tags/<tag>/0001.json, ...   created once each, without gaps: an artifact's id, or null: none any more

The last entry is what holds. Whoever moves a tag creates the entry behind the one that they have seen, so of two at once one
finds that the tag is not where it was: compare-and-swap on any store with an atomic create. What a tag was on stays known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import IntegrityError, RequestError
from counterweight.workers.storage import ObjectStore

TAGS = "tags"
ARTIFACT_ID = r"[0-9a-f]{16}"
TAG = r"[a-z][-_.a-z0-9]{0,62}"
RESERVED = ("latest", TAGS)

_KEY = re.compile(rf"{TAGS}/(?P<tag>{TAG})/(?P<number>[0-9]{{4}})\.json")
_NAMED = re.compile(rf"(?P<root>.+/[a-z0-9-]{{1,63}})(?:@|%40)(?P<tag>{TAG})/?")
MAX_MOVES = 9999


class MovedError(RequestError):
    """The tag is not on the artifact that it was expected on."""


class Moved(Config):
    """An entry: which artifact the tag is on from then on; null: none."""

    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=f"^{ARTIFACT_ID}$")] | None


def check_tag(tag: str) -> str:
    """The tag; RequestError for what cannot be one."""
    if re.fullmatch(TAG, tag) is None or tag in RESERVED or re.fullmatch(ARTIFACT_ID, tag) is not None:
        raise RequestError(
            f"tag {tag[:100]!r}: expected a letter and up to 62 letters, digits, '-', '_' and '.', neither latest nor an id"
        )
    return tag


def named_by_tag(uri: str) -> tuple[str, str] | None:
    """The root of a name and the tag, of `<output>/<name>@<tag>`; None for any other URI."""
    found = _NAMED.fullmatch(uri)
    return None if found is None else (found["root"], found["tag"])


def tagged(store: ObjectStore, tag: str) -> str | None:
    """Id of the artifact that a tag is on; None where there is none. store: of a name's artifacts. StorageError."""
    keys = _entries(store, f"{TAGS}/{check_tag(tag)}/").get(tag)
    return None if keys is None else _read(store, keys[-1])


def tags(store: ObjectStore) -> dict[str, str]:
    """Tag -> id of the artifact that it is on. StorageError."""
    found = {tag: _read(store, keys[-1]) for tag, keys in _entries(store, f"{TAGS}/").items()}
    return {tag: id for tag, id in found.items() if id is not None}


def move(store: ObjectStore, tag: str, to: str | None, *, before: str | None) -> bool:
    """Puts a tag on the artifact of id `to`, None to delete it; whether that changed anything. before: the id that it is
    expected on, None for nowhere. MovedError where it is elsewhere, which holds for the slower of two as well; StorageError."""
    keys = _entries(store, f"{TAGS}/{check_tag(tag)}/").get(tag, [])
    now = _read(store, keys[-1]) if keys else None
    if now != before:
        raise MovedError(f"tag {tag}: is on {now or 'nothing'}: expected {before or 'nothing'}")
    if now == to:
        return False
    if len(keys) == MAX_MOVES:
        raise RequestError(f"tag {tag}: was moved {MAX_MOVES} times: expected fewer")
    entry = Moved(id=to).model_dump_json().encode()
    if not store.create(f"{TAGS}/{tag}/{len(keys) + 1:04}.json", entry):
        raise MovedError(f"tag {tag}: was moved meanwhile: expected it on {before or 'nothing'}")
    return True


def put(store: ObjectStore, tag: str, to: str | None) -> bool:
    """As `move`, wherever the tag is."""
    while True:
        try:
            return move(store, tag, to, before=tagged(store, tag))
        except MovedError:
            continue


def _entries(store: ObjectStore, prefix: str) -> Mapping[str, list[str]]:
    """Tag -> keys of its entries, in order."""
    found: dict[str, list[str]] = {}
    for match in (_KEY.fullmatch(info.key) for info in store.list(prefix)):
        if match is not None:
            found.setdefault(match["tag"], []).append(match[0])
    return {tag: sorted(keys) for tag, keys in sorted(found.items())}


def _read(store: ObjectStore, key: str) -> str | None:
    try:
        return Moved.model_validate_json(store.read(key)).id
    except ValidationError as error:
        raise IntegrityError(f"{store.uri_of(key)}: no entry of a tag: {first_problem(error)}") from error
