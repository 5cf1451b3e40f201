"""Which byte ranges to request for a set of tensors: few requests, in bounded pieces, with little that is not
wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from counterweight.workers.checkpoint.header import TensorEntry

# Object stores reach a connection's full rate from about 8 MiB a request; eight in flight stay within 64 MiB.
MAX_READ = 8 << 20

# A request costs some 20 ms, in which a connection of 100 MB/s would have carried 2 MB: below, read across.
MAX_GAP = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a tensor inside a read: `length` bytes at `position` of the read are those at `offset` of
    the tensor."""

    entry: TensorEntry
    offset: int
    position: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One range request, at most `MAX_READ` bytes, and the tensor pieces it carries."""

    file: str
    start: int
    length: int
    parts: tuple[Part, ...]


def plan_reads(
    entries: Iterable[TensorEntry], *, max_read: int = MAX_READ, max_gap: int = MAX_GAP
) -> list[tuple[Read, ...]]:
    """Groups of reads, each covering whole tensors; the reads of a group are in the order of its tensor's
    bytes.

    Neighbours in a file share a read when they fit in one and at most `max_gap` unwanted bytes lie between
    them; a tensor beyond `max_read` is a group of its own, cut at multiples of `max_read` (a multiple of 8,
    so that no element is cut). Every byte wanted is requested exactly once.
    """
    groups: list[tuple[Read, ...]] = []
    run: list[TensorEntry] = []
    for entry in sorted(entries, key=attrgetter("file", "start", "length")):
        if run and not _joins(run, entry, max_read, max_gap):
            groups.append((_shared(run),))
            run = []
        if entry.length > max_read:
            groups.append(_cut(entry, max_read))
        else:
            run.append(entry)
    if run:
        groups.append((_shared(run),))
    return groups


def _joins(run: list[TensorEntry], entry: TensorEntry, max_read: int, max_gap: int) -> bool:
    first, last = run[0], run[-1]
    gap = entry.start - (last.start + last.length)
    end = entry.start + entry.length
    return entry.file == first.file and gap <= max_gap and end - first.start <= max_read


def _shared(run: list[TensorEntry]) -> Read:
    start, last = run[0].start, run[-1]
    return Read(
        file=last.file,
        start=start,
        length=last.start + last.length - start,
        parts=tuple(Part(entry=e, offset=0, position=e.start - start, length=e.length) for e in run),
    )


def _cut(entry: TensorEntry, size: int) -> tuple[Read, ...]:
    lengths = ((offset, min(size, entry.length - offset)) for offset in range(0, entry.length, size))
    return tuple(
        Read(
            file=entry.file,
            start=entry.start + offset,
            length=length,
            parts=(Part(entry=entry, offset=offset, position=0, length=length),),
        )
        for offset, length in lengths
    )
