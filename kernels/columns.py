"""What the columns of one block do to each other, in rounding order: the part of both loops that goes column by column.

In torch, for all weights of a batch at once, because a step is a handful of operations whose cost is mostly that of the call
where a weight is small; where kernels run, one kernel takes a block's columns one after the other
(`kernels.gpu.columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.backend import runs_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnGrid:
    """The grid of a block's columns. steps: [weights, columns, out] float32. zeros: zero points likewise, None for a symmetric
    grid. lowest, highest: codes, before the zero point is subtracted."""

    steps: Tensor
    zeros: Tensor | None
    lowest: int
    highest: int

    def bounds(self) -> Sequence[tuple[int, int] | tuple[Tensor, Tensor]]:
        """The least and the largest centred code of each column."""
        if self.zeros is None:
            return [(self.lowest, self.highest)] * self.steps.shape[1]
        return [(self.lowest - zero, self.highest - zero) for zero in self.zeros.unbind(1)]


def columns_at_once(device: torch.device, block_size: int) -> int:
    """Columns of a block: as many as are asked for, and as a kernel takes where kernels run."""
    if not runs_kernels(device):
        return block_size
    from counterweight.kernels.gpu.columns import MOST_COLUMNS

    return min(block_size, MOST_COLUMNS)


def feed_back_(codes: Tensor, error: Tensor, *, target: Tensor, aim: Tensor, feed: Tensor, grid: ColumnGrid) -> None:
    """Rounds the columns of a block one after the other, each to the code nearest to its aim, and passes its error on to the
    aims of those behind it; fills in `codes` and `error`, target minus value.

    codes, error, target, aim: [weights, columns, out] float32, each column of a weight contiguous; codes are centred. feed:
    [weights, columns, columns]: what column j's error counts in the aim of column k > j stands in row j. `aim` is used up.
    """
    if runs_kernels(codes.device):
        from counterweight.kernels.gpu.columns import feed_back_ as in_a_kernel

        in_a_kernel(codes, error, target=target, aim=aim, feed=feed, grid=grid)
        return
    targets, aims, rounded, errors = (matrix.unbind(1) for matrix in (target, aim, codes, error))
    passed, feeds = error.unsqueeze(2).unbind(1), _behind(feed)
    steps, bounds = grid.steps.unbind(1), grid.bounds()
    for place in range(codes.shape[1]):
        _clamp(torch.div(aims[place], steps[place], out=rounded[place]).round_(), bounds[place])
        torch.addcmul(targets[place], rounded[place], steps[place], value=-1, out=errors[place])
        aim = aim.narrow(1, 1, aim.shape[1] - 1)
        aim.addcmul_(feeds[place], passed[place])


def descend_(codes: Tensor, error: Tensor, *, before: Tensor, slope: Tensor, pull: Tensor, grid: ColumnGrid) -> None:
    """Sets each column of a block in turn to its best codes given all the others; fills in `codes` and keeps `error`, target
    minus value, up to date.

    codes, error, before (the codes so far), slope (of the objective, over H_jj): [weights, columns, out] float32 as in
    `feed_back_`. pull: [weights, columns, columns]: what a change of column j takes off the slope of column k > j stands in row
    j. `slope` is used up.
    """
    if runs_kernels(codes.device):
        from counterweight.kernels.gpu.columns import descend_ as in_a_kernel

        in_a_kernel(codes, error, before=before, slope=slope, pull=pull, grid=grid)
        return
    earlier, after, slopes = (matrix.unbind(1) for matrix in (before, codes, slope))
    change = torch.empty_like(codes[:, 0])
    passed, pulls = change.unsqueeze(1), _behind(pull)
    steps, bounds = grid.steps.unbind(1), grid.bounds()
    for place in range(codes.shape[1]):
        _clamp(torch.addcdiv(earlier[place], slopes[place], steps[place], out=after[place]).round_(), bounds[place])
        torch.sub(after[place], earlier[place], out=change).mul_(steps[place])
        slope = slope.narrow(1, 1, slope.shape[1] - 1)
        slope.addcmul_(pulls[place], passed, value=-1)
    error.sub_((codes - before).mul_(grid.steps))


def _clamp(codes: Tensor, bounds: tuple[int, int] | tuple[Tensor, Tensor]) -> None:
    torch.clamp(codes, *bounds, out=codes)


def _behind(matrices: Tensor) -> list[Tensor]:
    """Of each row of [weights, columns, columns] what lies behind the diagonal: [weights, rest, 1]."""
    columns = matrices.shape[1]
    rows = matrices.unsqueeze(3).unbind(1)
    return [row.narrow(1, place + 1, columns - place - 1) for place, row in enumerate(rows)]
