"""A block over the shards of its inputs: its outputs, and the moments of what enters each of its linears."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.calibration.statistics import Accumulator, Gathering, ShardMoments
from counterweight.workers.errors import RequestError
from counterweight.workers.hooks import input_hooks
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.parallel import Shards
from counterweight.workers.quantization.inputs import all_finite, check_activations

if TYPE_CHECKING:
    from counterweight.workers.models.block_builder import (
        Block,  # transformers, which who only reads reports does not need
    )

Output = TypeVar("Output")

Load = Callable[[], Tensor]
"""Reads one shard of hidden states [sequences, length, hidden]."""


class RunningStatistics:
    """The moments of what entered each group of a block's linears so far: sums over shards, added in the shards' order."""

    def __init__(self, block: Block, gatherings: Mapping[SharedInputGroup, Gathering]) -> None:
        self.gatherings = gatherings
        self._sums = {group: _accumulator(block, group, gathering) for group, gathering in gatherings.items()}

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        return sum(accumulator.bytes for accumulator in self._sums.values())

    def add(self, moments: dict[SharedInputGroup, ShardMoments]) -> None:
        """Adds a shard's and takes them out of `moments`, so that nothing of a shard stays while the next one runs."""
        while moments:
            group, shard = moments.popitem()
            self._sums[group].add(shard)
            del shard

    def result(self) -> PackedStatistics:
        """The statistics; nothing can be added after. A non-finite activation is a RequestError that names the group."""
        packed = {group: self._sums.pop(group).packed() for group in self.gatherings}
        for group, found in packed.items():
            if not all_finite(found.triangles["xx"].entries):
                raise RequestError(f"the input of {group[0]} is not finite on the calibration tokens")
        return PackedStatistics(packed)


def run_shards(
    block: Block,
    inputs: Sequence[Load],
    emit: Callable[[Tensor], Output],
    sums: RunningStatistics,
    shards: Shards,
    originals: Sequence[Load] = (),
) -> list[Output]:
    """Runs the block over shards of its inputs and adds their moments to `sums`; what `emit` makes of each output.

    inputs: one callable per shard; the shards' number and order are part of the result. originals: likewise, what enters the
    block in the original model; empty when that is the same. emit: what to do with a shard's output (write it, drop it), that
    of the originals if there are any. shards: how they are gone through.
    """
    replicas: queue.SimpleQueue[Block] = queue.SimpleQueue()
    for _ in range(shards.computing):
        replicas.put(block.replica())

    # A router may send other tokens to an expert than in the original model, so that rows have no partners.
    partnered = [group for group in sums.gatherings if not is_expert(group[0])]

    def read(loads: tuple[Load, Load | None]) -> tuple[Tensor, Tensor | None]:
        load, load_original = loads
        return load(), None if load_original is None else load_original()

    def run(hidden: tuple[Tensor, Tensor | None]) -> tuple[dict[SharedInputGroup, ShardMoments], Tensor]:
        entered, original = hidden
        replica = replicas.get()
        meant: dict[SharedInputGroup, Tensor] = {}
        moments: dict[SharedInputGroup, ShardMoments] = {}

        def take(group: SharedInputGroup, rows: Tensor) -> None:
            check_activations(f"the input of {group[0]}", rows)
            moments[group] = ShardMoments.of(rows, sums.gatherings[group], meant.get(group))

        try:
            if original is not None:
                with input_hooks(replica, partnered, meant.__setitem__):
                    output = replica.run(original)
            with input_hooks(replica, sums.gatherings, take):
                seen = replica.run(entered)
            output = seen if original is None else output
            check_activations("the block's output", output)
            return moments, output
        finally:
            replicas.put(replica)

    nothing: list[Load | None] = [None] * len(inputs)
    return shards.run(list(zip(inputs, originals or nothing, strict=True)), read, run, sums.add, emit)


def _accumulator(block: Block, group: SharedInputGroup, gathering: Gathering) -> Accumulator:
    return Accumulator(block.linear(group[0]).in_features, block.device, gathering)
