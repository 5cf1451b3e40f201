"""Experts that saw too few tokens, and what they are solved on beside them: tokens of their layer, run through them alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration, Starvation
from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.shrinkage import shrunk
from counterweight.workers.calibration.statistics import Accumulator, Gathering, PackedMoments
from counterweight.workers.errors import RequestError
from counterweight.workers.held_out import HeldOutRows, Rows
from counterweight.workers.hooks import input_hooks
from counterweight.workers.models.family import SharedInputGroup, expert_of, is_expert
from counterweight.workers.quantization.inputs import all_finite

if TYPE_CHECKING:
    from counterweight.workers.models.block_builder import Block

STRETCH = 1024
"""Tokens that an expert is run on at a time. Part of the numerics: sums are taken stretch by stretch."""

ENOUGH = 32
"""Held-out tokens of an expert by which it is judged; one with fewer is judged by those of its layer."""

Gatherings = Mapping[SharedInputGroup, Gathering]


def row_sample(block: Block, gatherings: Gatherings, options: ExpertCalibration | None) -> RowSample | None:
    """What keeps tokens of a sparse block's layer for `feed`; None where nobody will ask for them. options: how its experts are
    calibrated."""
    sparse = block.separate_experts()
    fed = any(is_expert(group[0]) and gathering.anything for group, gathering in gatherings.items())
    if options is None or not options.samples or sparse is None or not fed:
        return None
    return RowSample(options.rows_of(sparse[1].hidden))


def feed(
    block: Block, statistics: PackedStatistics, gatherings: Gatherings, rows: Tensor, options: ExpertCalibration
) -> None:
    """Replaces, in `statistics`, those of each group of an expert's linears that saw fewer tokens than its floor: they are
    shrunk toward what the expert makes of the layer's `rows` [tokens, hidden]. Where tokens are only counted, nothing is solved
    on them.

    gatherings: what was gathered of each group. RequestError where an expert makes something that is not finite of the rows.
    """
    starved: dict[int, list[SharedInputGroup]] = {}
    for group, found in statistics.packed.items():
        few = is_expert(group[0]) and options.lacking(found.width, found.tokens)
        if few and gatherings[group].anything:
            starved.setdefault(expert_of(group[0]), []).append(group)
    # One expert at a time, so that the sums of one are in memory twice.
    for expert, groups in starved.items():
        sums = _through(block, expert, {group: gatherings[group] for group in groups}, rows)
        for group in groups:
            own, layer = statistics.packed[group], _finite(group, sums.pop(group))
            lack = Starvation(
                tokens=own.tokens,
                drawn=own.drawn,
                floor=options.floor_of(own.width),
                rows=len(rows),
                weight=options.weight_of(own.width),
            )
            statistics.packed[group] = shrunk(own, layer, lack)


def judged_by(block: Block, groups: Iterable[SharedInputGroup], unseen: HeldOutRows) -> dict[SharedInputGroup, Rows]:
    """Rows of tokens that nothing was solved on, for each of `groups`: those that reached it; where these are few, as of an
    expert that sees hardly any, what the expert makes of tokens that its layer was given."""
    found: dict[SharedInputGroup, Rows] = {}
    few: dict[int, list[SharedInputGroup]] = {}
    for group in groups:
        rows = unseen.rows(group)
        if rows is not None and (len(rows.x) >= ENOUGH or not is_expert(group[0])):
            found[group] = rows
        elif is_expert(group[0]):
            few.setdefault(expert_of(group[0]), []).append(group)
    sparse, given = block.separate_experts(), None if unseen.sample is None else unseen.sample.rows()
    if sparse is None or given is None:
        return found
    for expert, own in few.items():
        seen: dict[SharedInputGroup, Tensor] = {}
        with torch.no_grad(), input_hooks(block, own, seen.__setitem__):
            sparse[1].run(expert, given)
        found |= {group: Rows(rows, of_layer=True) for group, rows in seen.items()}
    return found


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
        sums[group].add_rows(seen)

    with torch.no_grad(), input_hooks(block, gatherings, take):
        for stretch in rows.split(STRETCH):
            found[1].run(expert, stretch)
    return sums


def _finite(group: SharedInputGroup, sums: Accumulator) -> PackedMoments:
    packed = sums.packed()
    if "xx" in packed.triangles and not all_finite(packed.triangles["xx"].entries):
        raise RequestError(
            f"the input of {group[0]} is not finite on tokens that the router sent to other experts: expected it to be, "
            "or calibration.experts.floor 0, which leaves the expert with its own"
        )
    return packed
