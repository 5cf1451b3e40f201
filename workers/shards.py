"""A block over the shards of its inputs: its outputs, and the moments of what enters each of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from counterweight.kernels.backend import runs_kernels
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.statistics import Accumulator, Gathering, ShardMoments, add_groups
from counterweight.workers.drawing import DrawnStatistics
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.parallel import Shards, Share
from counterweight.workers.pieces import Found, Gatherer, ShardRun
from counterweight.workers.quantization.inputs import all_finite, not_finite

if TYPE_CHECKING:
    from counterweight.workers.models.block_builder import (
        Block,  # transformers, which who only reads reports does not need
    )

Output = TypeVar("Output")

Load = Callable[[], Tensor]
"""Reads one shard of hidden states [sequences, length, hidden]."""


class RunningStatistics:
    """The moments of what entered each group of a block's linears so far: sums over shards, added in the shards' order."""

    def __init__(
        self,
        block: Block,
        gatherings: Mapping[SharedInputGroup, Gathering],
        *,
        every_token: bool = False,
        sample: RowSample | None = None,
    ) -> None:
        self.gatherings = gatherings
        self.every_token = every_token
        self.sample = sample
        self._sums = {group: _accumulator(block, group, gathering) for group, gathering in gatherings.items()}
        self._drawn: DrawnStatistics | None = None
        self._uncounted: list[tuple[list[Accumulator | None], Tensor]] = []
        self._device, self._dtype = block.device, block.dtype

    @property
    def bytes(self) -> int:
        """Memory of the sums, and of the tokens that are kept."""
        kept = 0 if self.sample is None else self.sample.bytes
        return kept + sum(accumulator.bytes for accumulator in self._sums.values())

    def of(
        self, group: SharedInputGroup, rows: Tensor, original: Tensor | None, share: Share[None]
    ) -> ShardMoments | None:
        """The moments of a shard's rows [..., in]. None where kernels run: one thread computes there, so they are added at once
        and take no memory."""
        if runs_kernels(rows.device):
            self._sums[group].add_rows(rows, original)
            return None
        return ShardMoments.of(rows, self.gatherings[group], original, share)

    def takes_all(self, groups: Iterable[SharedInputGroup]) -> bool:
        """See `Gatherer`."""
        chosen = [self.gatherings[group] for group in groups if group in self.gatherings]
        return runs_kernels(self._device) and not any(one.absolute or one.thresholds for one in chosen)

    def of_all(self, groups: Sequence[SharedInputGroup | None], rows: Tensor, bounds: Tensor) -> None:
        """See `Gatherer`."""
        sums = [None if group is None else self._sums[group] for group in groups]
        if any(one is not None for one in sums):
            add_groups(sums, rows, bounds)
            self._uncounted.append((sums, bounds))

    def refuses(self, group: SharedInputGroup) -> bool:
        """See `Gatherer`: `result` looks at the sums. At rows a GPU would be waited for, and a CPU reads them once more."""
        gathering = self.gatherings[group]
        return gathering.products and not gathering.thresholds  # which are no sums

    def add(self, moments: dict[SharedInputGroup, ShardMoments | None], given: list[Tensor]) -> None:
        """See `Gatherer`."""
        while given:
            rows = given.pop()
            if self.sample is not None:
                self.sample.add(rows)
        while moments:
            group, shard = moments.popitem()
            if shard is not None:
                self._sums[group].add(shard)
            del shard
        while self._uncounted:
            sums, bounds = self._uncounted.pop()
            for one, tokens in zip(sums, bounds.diff().tolist(), strict=True):
                if one is not None:
                    one.count(tokens)

    def drawing(self, options: ExpertCalibration | None) -> DrawnStatistics:
        """What adds drawn shards to the sums of experts below their floor; below it when this is called first. options: how
        experts are calibrated, None in a dense block, where nobody lacks tokens."""
        if self._drawn is None:
            experts = {group: sums for group, sums in self._sums.items() if is_expert(group[0])}
            lacking = {
                group: sums.tokens
                for group, sums in experts.items()
                if options is not None and options.lacking(sums.width, sums.tokens) and self.gatherings[group].anything
            }
            self._drawn = DrawnStatistics(self, lacking)
        return self._drawn

    def take_rows(self) -> Tensor | None:
        """The tokens that are kept, which are kept no longer; None without any."""
        found, self.sample = self.sample, None
        return None if found is None else found.rows()

    def result(self) -> PackedStatistics:
        """The statistics; nothing can be added after. A non-finite activation is a RequestError that names the group."""
        packed = {group: self._sums.pop(group).packed() for group in self.gatherings}
        for group, found in packed.items():
            if "xx" in found.triangles and not all_finite(found.triangles["xx"].entries):
                raise not_finite(f"the input of {group[0]}", self._dtype)
        for group, before in {} if self._drawn is None else self._drawn.lacking.items():
            packed[group] = replace(packed[group], drawn=packed[group].tokens - before)
        return PackedStatistics(packed)


def run_shards(
    block: Block,
    inputs: Sequence[Load],
    emit: Callable[[Tensor], Output],
    gatherer: Gatherer[Found],
    shards: Shards,
    originals: Sequence[Load] = (),
) -> list[Output]:
    """Runs the block over shards of its inputs and has `gatherer` look at what enters its linears; what `emit` makes of each
    output.

    inputs: one callable per shard; the shards' number and order are part of the result. originals: likewise, what enters the
    block in the original model; empty when that is the same. emit: what to do with a shard's output (write it, drop it), that
    of the originals if there are any. shards: how they are gone through.
    """
    shard = ShardRun(block, gatherer, shards)

    def read(loads: tuple[Load, Load | None]) -> tuple[Tensor, Tensor | None]:
        load, load_original = loads
        return load(), None if load_original is None else load_original()

    nothing: list[Load | None] = [None] * len(inputs)
    return shards.run(
        list(zip(inputs, originals or nothing, strict=True)), read, shard, lambda seen: gatherer.add(*seen), emit
    )


def _accumulator(block: Block, group: SharedInputGroup, gathering: Gathering) -> Accumulator:
    return Accumulator(block.linear(group[0]).in_features, block.device, gathering)
