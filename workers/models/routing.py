"""Which experts a sparse block's router sends its tokens to, and how often two models agree on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn

from counterweight.workers.models.block_builder import Block

Run = tuple[Tensor, Tensor | None]
"""A block's output, and the experts that each of its tokens is sent to, [tokens, experts] bool; None in a dense block."""


@contextmanager
def watched(block: Block) -> Iterator[Router]:
    """The block as a `Router`, while the context is open."""
    router = Router(block)
    handle = None if (experts := block.routed()) is None else experts.register_forward_pre_hook(router.look)
    try:
        yield router
    finally:
        if handle is not None:
            handle.remove()


class Router:
    """A block that tells, beside its output, what its router chose. Threads may share it: a thread's hook is called in it."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._chosen: dict[int, Tensor] = {}

    def look(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Hook of the experts: called with tokens and the indices of their experts, or with what each expert is given."""
        experts = self._block.experts_in_config
        if len(given) == 1:
            chosen = given[0].unflatten(0, (experts, -1)).any(-1).T
        else:
            chosen = torch.zeros(len(given[1]), experts, dtype=torch.bool, device=given[1].device)
            chosen.scatter_(1, given[1], value=True)
        self._chosen[threading.get_ident()] = chosen

    def run(self, hidden: Tensor) -> Run:
        """hidden [batch, length, hidden] -> the block's output, and its tokens' experts."""
        output = self._block.run(hidden)
        return output, self._chosen.pop(threading.get_ident(), None)


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts a model's routers send tokens to. packed: sparse block -> [tokens, ceil(experts / 8)] uint8, a bit for each
    expert, the first in the highest."""

    packed: dict[int, Tensor] = field(default_factory=dict)

    def add(self, block: int, chosen: Sequence[Tensor | None]) -> None:
        """Takes in a block. chosen: of each batch [tokens, experts] bool; a dense block's is left out."""
        found = [batch.cpu().numpy() for batch in chosen if batch is not None]
        if found:
            self.packed[block] = torch.from_numpy(numpy.packbits(numpy.concatenate(found), axis=1))

    def agreement(self, block: int, chosen: Sequence[Tensor | None], length: int) -> list[float]:
        """Share of each window's tokens that another model, whose choices are given, sends to the same experts. length:
        tokens of a window. Empty for a dense block."""
        own = Routes()
        own.add(block, chosen)
        if block not in own.packed:
            return []
        same = (own.packed[block] == self.packed[block]).all(-1)
        shares: list[float] = same.double().unflatten(0, (-1, length)).mean(-1).tolist()
        return shares
