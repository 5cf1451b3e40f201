"""Several safetensors blobs as one file, for formats that allow only one (PEFT adapters).

One thread finds its sha256: 9 s for the 12 GB of branches of a Mixtral-8x7B. So the file is begun while its last parts are
still being made, as far as the order of its tensors allows, with the header that it will have if these are like others. Where
one is not, it is begun anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, groupby, takewhile

from torch import Tensor

from counterweight.workers.ahead import ReadAhead
from counterweight.workers.checkpoint.dtypes import StoredDtype
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.checkpoint.writer import TurnWriter, header_bytes
from counterweight.workers.errors import IntegrityError
from counterweight.workers.parallel import in_parallel
from counterweight.workers.storage import ObjectStore
from counterweight.workers.storage.base import Written
from counterweight.workers.workspace import Blob, Workspace

Part = tuple[Blob, Mapping[str, str]]
"""A blob, and its tensors with their digests (`checkpoint.digest`)."""

Awaited = tuple[Blob, Mapping[str, str]]
"""What a blob that is not there yet will be like: another one, and its tensors with the names that they will have."""


class BegunFiles:
    """The files that a worker has begun to join and not finished, by URI."""

    def __init__(self) -> None:
        self._held: dict[str, TurnWriter] = {}

    def take(self, uri: str, header: bytes) -> TurnWriter | None:
        """The file with this header, held no longer; None when there is none. One with another header is discarded."""
        file = self._held.pop(uri, None)
        if file is None or file.header == header:
            return file
        file.abort()
        return None

    def keep(self, uri: str, file: TurnWriter) -> None:
        """Holds a file that is not whole yet, in the place of none."""
        self._held[uri] = file

    def drop(self) -> None:
        """Discards all."""
        while self._held:
            self._held.popitem()[1].abort()


def join_tensors(
    workspace: Workspace,
    parts: Sequence[Part],
    store: ObjectStore,
    key: str,
    ahead: ReadAhead,
    begun: BegunFiles,
    awaited: Sequence[Awaited] = (),
) -> Written | None:
    """Writes the tensors of all parts as one file, every byte read verified; of all parts the headers are read first, then one
    part is in memory at a time, and another where `ahead` reads it meanwhile.

    parts: a name in two of them is an IntegrityError. begun: holds what an earlier call has written of this file. awaited: what
    is to come beside `parts`; with any the file is only begun, up to the first of their tensors, and there is no result.
    """
    place_of: dict[str, int] = {}
    for place, (blob, digests) in enumerate(parts):
        for name in digests:
            if name in place_of:
                raise IntegrityError(f"tensor {name} stands in two parts: {parts[place_of[name]][0].key}, {blob.key}")
            place_of[name] = place
    layout = _layout(workspace, parts, awaited)
    uri = store.uri_of(key)
    file = begun.take(uri, header_bytes(layout)) or TurnWriter(store, key, layout)
    there = takewhile(place_of.__contains__, file.left)
    # Names of one blob follow each other, once for each dtype.
    turns = [(place, list(names)) for place, names in groupby(there, place_of.__getitem__)]

    def read(turn: int) -> dict[str, Tensor]:
        place, names = turns[turn]
        blob, digests = parts[place]
        found = Checkpoint.of_file(workspace.store, blob.key)
        return found.read_many(names, sha256={name: digests[name] for name in names})

    with ExitStack() as unless_kept:
        unless_kept.enter_context(file)
        for (_, names), tensors in zip(turns, ahead.in_turn(key, len(turns), read), strict=True):
            for name in names:
                file.write(tensors.pop(name))
            del tensors  # before the next part is waited for
        if not awaited:
            return file.commit()
        unless_kept.pop_all()
        begun.keep(uri, file)
    return None


def _layout(
    workspace: Workspace, parts: Sequence[Part], awaited: Sequence[Awaited]
) -> dict[str, tuple[StoredDtype, tuple[int, ...]]]:
    """Of the whole file, as far as it is known."""
    named: Iterator[tuple[Blob, Mapping[str, str]]] = chain(
        ((blob, {name: name for name in digests}) for blob, digests in parts), awaited
    )
    blobs, names = zip(*named, strict=True)
    found: dict[str, tuple[StoredDtype, tuple[int, ...]]] = {}
    for header, own in zip(in_parallel(workspace.get_header, blobs), names, strict=True):
        for name, written in own.items():
            entry = header.entries[name]
            found[written] = (entry.dtype, entry.shape)
    return found
