"""Experts that saw too few tokens, and what they are solved on beside them: tokens of their layer, run through them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.shrinkage import Starvation, shrunk
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.errors import RequestError
from counterweight.workers.hooks import input_hooks
from counterweight.workers.models.family import SharedInputGroup, experts_of, is_expert
from counterweight.workers.quantization.inputs import all_finite

if TYPE_CHECKING:
    from counterweight.workers.models.block_builder import Block

STRETCH = 1024
"""Tokens that an expert is run on at a time. Part of the numerics: sums are taken stretch by stretch."""

Gatherings = Mapping[SharedInputGroup, Gathering]


def feed(
    block: Block,
    statistics: dict[SharedInputGroup, InputStatistics],
    gatherings: Gatherings,
    rows: Tensor,
    options: ExpertCalibration,
) -> dict[SharedInputGroup, Starvation]:
    """Replaces, in `statistics`, those of each group of an expert's linears that saw fewer tokens than its floor: they are
    shrunk toward what the expert makes of the layer's `rows` [tokens, hidden]. The groups that this befell.

    gatherings: what was gathered of each group. RequestError where an expert makes something that is not finite of the rows.
    """
    starved = {
        group: Starvation(
            tokens=found.tokens,
            floor=options.floor_of(found.width),
            rows=len(rows),
            weight=options.weight_of(found.width),
        )
        for group, found in statistics.items()
        if is_expert(group[0]) and found.tokens < options.floor_of(found.width)
    }
    # One expert at a time, so that the sums of one are in memory twice.
    for expert in experts_of(group[0] for group in starved):
        own = [group for group in starved if experts_of(group[:1]) == [expert]]
        sums = _through(block, expert, {group: gatherings[group] for group in own}, rows)
        for group in own:
            statistics[group] = shrunk(statistics[group], _finite(group, sums.pop(group)), starved[group].weight)
    return starved


def _through(block: Block, expert: int, gatherings: Gatherings, rows: Tensor) -> dict[SharedInputGroup, Accumulator]:
    """Sums of what enters an expert's linears when it is run on `rows`."""
    found = block.separate_experts()
    if found is None:
        raise ValueError(f"block: dense: expected one with an expert {expert}")
    sums = {
        group: Accumulator(block.linear(group[0]).in_features, rows.device, gathering)
        for group, gathering in gatherings.items()
    }

    def take(group: SharedInputGroup, seen: Tensor) -> None:
        sums[group].add(ShardMoments.of(seen, gatherings[group]))

    with torch.no_grad(), input_hooks(block, gatherings, take):
        for stretch in rows.split(STRETCH):
            found[1].run(expert, stretch)
    return sums


def _finite(group: SharedInputGroup, sums: Accumulator) -> InputStatistics:
    statistics = sums.result()
    if not all_finite(statistics.gram):
        raise RequestError(
            f"the input of {group[0]} is not finite on tokens that the router sent to other experts: expected it to be, "
            "or calibration.experts.floor 0, which leaves the expert with its own"
        )
    return statistics
