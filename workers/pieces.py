"""A block over one shard of its inputs, on a CPU piece by piece: threads that have nothing else to do take some.

A piece is a few sequences, as many whatever the number of threads. What enters the linears is looked at when all pieces are
through, so that sums over a shard know nothing of its pieces. Until then pieces put it, and what comes out, where a shard's
lies, each in its own place.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.hooks import Take, expert_hook, input_hooks
from counterweight.workers.models.family import PROJECTIONS, SharedInputGroup, expert_of, is_expert
from counterweight.workers.parallel import Shards, Share, piece_sequences
from counterweight.workers.quantization.inputs import all_finite, check_activations

if TYPE_CHECKING:
    from counterweight.workers.models.block_builder import (
        Block,  # transformers, which who only reads reports does not need
    )
    from counterweight.workers.models.experts import SeparateExperts

Found = TypeVar("Found")


class Gatherer(Protocol[Found]):
    """What looks at the rows that enter a block's linears, shard by shard.

    gatherings: the groups of linears, and what is gathered of each. every_token: experts see all tokens, and not those that the
    router sends them. sample: keeps some of the tokens that experts are given; None: none is kept.
    """

    gatherings: Mapping[SharedInputGroup, Gathering]
    every_token: bool
    sample: RowSample | None

    def of(self, group: SharedInputGroup, rows: Tensor, original: Tensor | None, share: Share[None]) -> Found:
        """What one shard gives. rows: [..., in]; original: in the original model, where that differs. Threads call it. share:
        does what threads may do side by side."""
        ...

    def takes_all(self, groups: Iterable[SharedInputGroup]) -> bool:
        """Whether it takes rows of all experts at once, in the place of each one's."""
        ...

    def of_all(self, groups: Sequence[SharedInputGroup | None], rows: Tensor, bounds: Tensor) -> None:
        """What one shard gives of experts. groups: of each expert's linears the one that the rows enter, None where nothing is
        gathered of it. rows [rows, in], bounds: see `workers.models.at_once.Watch`."""
        ...

    def refuses(self, group: SharedInputGroup) -> bool:
        """Whether it refuses rows of this group that are not finite by itself, later than they come by."""
        ...

    def add(self, found: dict[SharedInputGroup, Found], given: list[Tensor]) -> None:
        """Takes a shard's out of `found`, in the order of the shards, so that nothing of one stays while the next one runs.
        given: the tokens that its experts were given, of which some are kept; taken out likewise."""
        ...


Key = tuple[SharedInputGroup, bool]
"""A group of linears, and whether what enters it in the original model is meant, where that differs."""


class _Room:
    """Of one shard, what enters groups of linears that every token enters, [tokens, in] each. Threads put a piece's rows in
    their place. The next shard finds the memory again: a page that is new to the process takes longer than filling it."""

    def __init__(self) -> None:
        self._space: dict[Key, Tensor] = {}
        self._filled: dict[Key, int] = {}
        self._lock = Lock()

    def put(self, key: Key, piece: slice, tokens: int, rows: Tensor) -> None:
        """rows: [..., in] of the tokens `piece` of a shard of so many `tokens`."""
        flat = rows.flatten(0, -2)
        with self._lock:
            space = self._space.get(key)
            if space is None or len(space) < tokens:
                space = self._space[key] = flat.new_empty(tokens, flat.shape[1])
            self._filled[key] = tokens
        space[piece] = flat

    def take(self, key: Key) -> Tensor | None:
        """Of the whole shard [tokens, in], until the next one begins; None where nothing came."""
        tokens = self._filled.pop(key, None)
        return None if tokens is None else self._space[key][:tokens]


@dataclass(slots=True)
class _Piece:
    """What came by while a piece ran. output: the block's, of the original's inputs if there are any. given: what experts were
    given. rows: of each group that only some tokens enter, what entered it [..., in]."""

    output: Tensor
    given: list[Tensor]
    rows: dict[SharedInputGroup, Tensor] = field(default_factory=dict)


class ShardRun(Generic[Found]):
    """Runs a block over a shard at each call, and has `gatherer` look at what enters its linears. Threads call it."""

    def __init__(self, block: Block, gatherer: Gatherer[Found], shards: Shards) -> None:
        self._gatherer, self._shards = gatherer, shards
        self._replicas: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self._replicas.put(block)
        for _ in range(shards.computing - 1):
            self._replicas.put(block.replica())
        self._rooms: queue.SimpleQueue[_Room] = queue.SimpleQueue()
        for _ in range(shards.computing):
            self._rooms.put(_Room())
        # A router may send other tokens to an expert than in the original model, so that rows have no partners.
        self._partnered = [group for group in gatherer.gatherings if not is_expert(group[0])]
        self._routed = self._partnered if gatherer.every_token else list(gatherer.gatherings)
        self._forced = [group for group in gatherer.gatherings if group not in self._routed]
        self._of_experts = [group for group in self._routed if is_expert(group[0])]

    def __call__(
        self, hidden: tuple[Tensor, Tensor | None]
    ) -> tuple[tuple[dict[SharedInputGroup, Found], list[Tensor]], Tensor]:
        """hidden: what enters the block [sequences, length, hidden], and what does in the original model where that differs.
        What `Gatherer.add` takes, and the output."""
        entered, original = hidden
        most = self._shards.piece_tokens
        together = len(entered) if most is None else piece_sequences(entered.shape[1], most)
        if together >= len(entered):
            return self._at_once(entered, original)
        room = self._rooms.get()
        try:
            return self._in_pieces(entered, original, together, room)
        finally:
            self._rooms.put(room)

    def _at_once(
        self, entered: Tensor, original: Tensor | None
    ) -> tuple[tuple[dict[SharedInputGroup, Found], list[Tensor]], Tensor]:
        """A shard whose rows are looked at as they come by, and not kept."""
        found: dict[SharedInputGroup, Found] = {}
        meant: dict[SharedInputGroup, Tensor] = {}

        def take(group: SharedInputGroup, rows: Tensor) -> None:
            found[group] = self._gatherer.of(group, rows, meant.get(group), self._shards.share)

        piece = self._run(entered, original, meant.__setitem__, take)
        return (found, piece.given), piece.output

    def _in_pieces(
        self, entered: Tensor, original: Tensor | None, together: int, room: _Room
    ) -> tuple[tuple[dict[SharedInputGroup, Found], list[Tensor]], Tensor]:
        """A shard of which a piece is so many sequences `together`."""
        sequences, length, _ = entered.shape
        output = torch.empty_like(entered)

        def run(first: int) -> _Piece:
            own = slice(first, min(first + together, sequences))
            tokens = slice(own.start * length, own.stop * length)
            rows: dict[SharedInputGroup, Tensor] = {}

            def mean(group: SharedInputGroup, entering: Tensor) -> None:
                room.put((group, True), tokens, sequences * length, entering)

            def take(group: SharedInputGroup, entering: Tensor) -> None:
                if is_expert(group[0]):
                    rows[group] = entering
                else:
                    room.put((group, False), tokens, sequences * length, entering)

            piece = self._run(entered[own], None if original is None else original[own], mean, take)
            output[own] = piece.output
            return _Piece(output[own], piece.given, rows)

        pieces = self._shards.share([partial(run, first) for first in range(0, sequences, together)])
        given = [torch.cat(parts) for parts in zip(*(piece.given for piece in pieces), strict=True)]
        found: dict[SharedInputGroup, Found] = {}
        for group in self._gatherer.gatherings:
            rows = _joined(pieces, group) if is_expert(group[0]) else room.take((group, False))
            if rows is not None:
                found[group] = self._gatherer.of(group, rows, room.take((group, True)), self._shards.share)
        return (found, given), output

    def _run(self, entered: Tensor, original: Tensor | None, mean: Take, take: Take) -> _Piece:
        """One piece. mean, take: called with what enters each group in the original model, where that differs, and here."""
        replica = self._replicas.get()
        given: list[Tensor] = []

        def checked(group: SharedInputGroup, entering: Tensor) -> None:
            if not self._gatherer.refuses(group):
                _check(group, entering)
            take(group, entering)

        def look(experts: SeparateExperts, tokens: Tensor) -> None:
            if self._gatherer.sample is not None:
                given.append(tokens)
            with input_hooks(replica, self._forced, checked):
                for expert in sorted({expert_of(group[0]) for group in self._forced}):
                    experts.run(expert, tokens)

        try:
            output: Tensor | None = None
            if original is not None:
                with input_hooks(replica, self._partnered, mean):
                    output = replica.run(original)
            watching = self._watching(replica, entered) if self._shards.piece_tokens is None else None
            hooked = self._routed if watching is None else self._partnered
            with watching or nullcontext(), input_hooks(replica, hooked, checked), expert_hook(replica, look):
                seen = replica.run(entered)
            output = seen if output is None else output
            if not all_finite(output):
                with input_hooks(replica, self._routed, _check):  # again, for the first linear to be named
                    replica.run(entered)
                check_activations("the block's output", output)
            return _Piece(output, given)
        finally:
            self._replicas.put(replica)

    def _watching(self, replica: Block, entered: Tensor) -> AbstractContextManager[None] | None:
        """What has the gatherer see all experts at once while it is open; None where it sees one by one."""
        sparse = replica.experts()
        if not self._of_experts or not sparse or not self._gatherer.takes_all(self._of_experts):
            return None
        _, experts = sparse[0]
        rows = entered.shape[0] * entered.shape[1] * replica.experts_of_token
        with torch.no_grad():  # as the block runs
            together = experts.at_once(rows, entered.dtype, entered.device)
        if together is None:
            return None
        entering: dict[bool, list[SharedInputGroup | None]] = {down: [None] * experts.experts for down in (False, True)}
        for group in self._of_experts:
            entering[group[0].endswith(f".{PROJECTIONS[-1]}")][expert_of(group[0])] = group

        def watch(projection: str, given: Tensor, bounds: Tensor) -> None:
            self._gatherer.of_all(entering[projection == PROJECTIONS[-1]], given, bounds)

        return experts.watched(together, watch)


def _check(group: SharedInputGroup, entering: Tensor) -> None:
    check_activations(f"the input of {group[0]}", entering)


def _joined(pieces: Sequence[_Piece], group: SharedInputGroup) -> Tensor | None:
    """Rows of a group [tokens, in], taken out of the pieces that have some; None where none has."""
    found = [piece.rows.pop(group).flatten(0, -2) for piece in pieces if group in piece.rows]
    return torch.cat(found) if found else None
