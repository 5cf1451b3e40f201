"""A block over one shard of its inputs, on a CPU piece by piece: threads that have nothing else to do take some.

A piece is a few sequences, as many whatever the number of threads. What enters the linears is looked at when all pieces are
through, so that sums over a shard know nothing of its pieces.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.hooks import expert_hook, input_hooks
from counterweight.workers.models.family import SharedInputGroup, expert_of, is_expert
from counterweight.workers.parallel import Shards, Share, piece_sequences
from counterweight.workers.quantization.inputs import check_activations

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

    def refuses(self, group: SharedInputGroup) -> bool:
        """Whether it refuses rows of this group that are not finite by itself, later than they come by."""
        ...

    def add(self, found: dict[SharedInputGroup, Found], given: list[Tensor]) -> None:
        """Takes a shard's out of `found`, in the order of the shards, so that nothing of one stays while the next one runs.
        given: the tokens that its experts were given, of which some are kept; taken out likewise."""
        ...


@dataclass(slots=True)
class _Piece:
    """What came by while a piece ran. output: the block's, of the original's inputs if there are any. rows: of each group what
    entered it, [..., in]; meant: in the original model, where that differs; given: what experts were given."""

    output: Tensor
    rows: dict[SharedInputGroup, Tensor]
    meant: dict[SharedInputGroup, Tensor]
    given: list[Tensor]


class ShardRun(Generic[Found]):
    """Runs a block over a shard at each call, and has `gatherer` look at what enters its linears. Threads call it."""

    def __init__(self, block: Block, gatherer: Gatherer[Found], shards: Shards) -> None:
        self._gatherer, self._shards = gatherer, shards
        self._replicas: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self._replicas.put(block)
        for _ in range(shards.computing - 1):
            self._replicas.put(block.replica())
        # A router may send other tokens to an expert than in the original model, so that rows have no partners.
        self._partnered = [group for group in gatherer.gatherings if not is_expert(group[0])]
        self._routed = self._partnered if gatherer.every_token else list(gatherer.gatherings)
        self._forced = [group for group in gatherer.gatherings if group not in self._routed]

    def __call__(
        self, hidden: tuple[Tensor, Tensor | None]
    ) -> tuple[tuple[dict[SharedInputGroup, Found], list[Tensor]], Tensor]:
        """hidden: what enters the block [sequences, length, hidden], and what does in the original model where that differs.
        What `Gatherer.add` takes, and the output."""
        entered, original = hidden
        most = self._shards.piece_tokens
        together = len(entered) if most is None else piece_sequences(entered.shape[1], most)
        parts = entered.split(together)
        originals = [None] * len(parts) if original is None else original.split(together)
        found: dict[SharedInputGroup, Found] = {}
        if len(parts) == 1:
            piece = self._run(entered, original, found)
            return (found, piece.given), piece.output
        pieces = self._shards.share([partial(self._run, *part) for part in zip(parts, originals, strict=True)])
        output = torch.cat([piece.output for piece in pieces])
        given = [torch.cat(parts) for parts in zip(*(piece.given for piece in pieces), strict=True)]

        for group in self._gatherer.gatherings:
            rows = _joined([piece.rows for piece in pieces], group)
            if rows is not None:
                meant = _joined([piece.meant for piece in pieces], group)
                found[group] = self._gatherer.of(group, rows, meant, self._shards.share)
        return (found, given), output

    def _run(
        self, entered: Tensor, original: Tensor | None, found: dict[SharedInputGroup, Found] | None = None
    ) -> _Piece:
        """One piece. found: where it is the whole shard; then rows are looked at as they come by, and not kept."""
        replica = self._replicas.get()
        rows: dict[SharedInputGroup, Tensor] = {}
        meant: dict[SharedInputGroup, Tensor] = {}
        given: list[Tensor] = []

        def take(group: SharedInputGroup, entering: Tensor) -> None:
            if not self._gatherer.refuses(group):
                check_activations(f"the input of {group[0]}", entering)
            if found is None:
                rows[group] = entering
            else:
                found[group] = self._gatherer.of(group, entering, meant.get(group), self._shards.share)

        def look(experts: SeparateExperts, tokens: Tensor) -> None:
            if self._gatherer.sample is not None:
                given.append(tokens)
            with input_hooks(replica, self._forced, take):
                for expert in sorted({expert_of(group[0]) for group in self._forced}):
                    experts.run(expert, tokens)

        try:
            output: Tensor | None = None
            if original is not None:
                with input_hooks(replica, self._partnered, meant.__setitem__):
                    output = replica.run(original)
            with input_hooks(replica, self._routed, take), expert_hook(replica, look):
                seen = replica.run(entered)
            output = seen if output is None else output
            check_activations("the block's output", output)
            return _Piece(output=output, rows=rows, meant=meant, given=given)
        finally:
            self._replicas.put(replica)


def _joined(pieces: Sequence[dict[SharedInputGroup, Tensor]], group: SharedInputGroup) -> Tensor | None:
    """Rows of a group [tokens, in], taken out of the pieces that have some; None where none has."""
    found = [piece.pop(group).flatten(0, -2) for piece in pieces if group in piece]
    return torch.cat(found) if found else None
