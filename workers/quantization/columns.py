"""The two loops over the columns of weights: error feedback and coordinate descent, blocked, in float32.

Weights of one shape go through the loops together, [batch, in, out]: a step is a handful of in-place operations, whose cost is
mostly that of the call where a weight is small. Each is transposed and permuted to its own order of rounding, so that a column
of a weight is a contiguous row. Columns of a block update each other at once; what lies outside the block is updated by one
matrix product per block and weight.

A weight's codes have the same bits in every batch: what is done to all weights at once is done entry by entry, and products
are those of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.quantization.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The quadratic form of a weight's output error in rounding order, H = U U^T with U upper triangular, by columns.

    feed: U_ij / U_jj. pull: H_jk / H_kk. Both [in, in] float32.
    """

    feed: Tensor
    pull: Tensor


class Columns:
    """Weights' columns with the grid of each; codes are float32 [batch, in, out], centred: the zero point is subtracted."""

    def __init__(self, weights: Sequence[Tensor], grids: Sequence[Grid], orders: Sequence[Tensor]) -> None:
        """weights: [out, in] float32, of one shape and on grids of one format. orders: [in], the column to be rounded first,
        second, ..."""
        self._grids, self._orders = grids, orders
        rows, columns = weights[0].shape
        self._target = weights[0].new_empty(len(weights), columns, rows)
        for target, weight, order in zip(self._target, weights, orders, strict=True):
            # Transposed first: rows are gathered faster than columns.
            torch.index_select(weight.T.contiguous(), 0, order, out=target)
        self._format = grids[0].format
        width = self._format.columns_per_group(columns)
        self._groups = torch.stack([order // width for order in orders])
        self._weights = torch.arange(len(weights), device=self._groups.device).unsqueeze(1)
        self._scales = torch.stack([grid.scale.float().T for grid in grids])
        zeros = [grid.zero_point.float().T for grid in grids if grid.zero_point is not None]
        self._zeros = torch.stack(zeros) if zeros else None

    def rounded(self, metrics: Sequence[Metric], refinement: int, block_size: int) -> Tensor:
        """Codes by error feedback, then by `refinement` passes of coordinate descent; a metric for each weight."""
        codes = self.feed_back([metric.feed for metric in metrics], block_size)
        return self.descend([metric.pull for metric in metrics], codes, refinement, block_size)

    def feed_back(self, feed: Sequence[Tensor], block_size: int) -> Tensor:
        """Rounds each column to the value nearest to w_j + sum_{i<j} e_i U_ij / U_jj, e = w - q, in order."""
        aim, codes, error = self._target.clone(), torch.empty_like(self._target), torch.empty_like(self._target)
        targets, aims, rounded, errors = (m.unbind(1) for m in (self._target, aim, codes, error))
        passed = error.unsqueeze(2).unbind(1)
        for start, stop in self._blocks(block_size):
            feeds = _within(feed, start, stop)
            steps, bounds = self._steps(start, stop), self._bounds(start, stop)
            later = aim[:, start:stop]
            for place, j in enumerate(range(start, stop)):
                _clamp(torch.div(aims[j], steps[place], out=rounded[j]).round_(), bounds[place])
                torch.addcmul(targets[j], rounded[j], steps[place], value=-1, out=errors[j])
                later = later.narrow(1, 1, stop - j - 1)
                later.addcmul_(feeds[place], passed[j])
            for own, weights, made in zip(aim, feed, error, strict=True):
                own[stop:].addmm_(weights[start:stop, stop:].T, made[start:stop])
        return codes

    def descend(self, pull: Sequence[Tensor], codes: Tensor, passes: int, block_size: int) -> Tensor:
        """Cyclic coordinate descent: each column in turn to its best codes given all the others; stops at a fixed point, where
        a further pass changes nothing."""
        error = torch.empty_like(codes)
        for start, stop in self._blocks(block_size):
            for j, step in enumerate(self._steps(start, stop), start):
                torch.addcmul(self._target[:, j], codes[:, j], step, value=-1, out=error[:, j])
        for _ in range(passes):
            updated = self._sweep(pull, codes, error, block_size)
            if torch.equal(updated, codes):
                break
            codes = updated
        return codes

    def _sweep(self, pull: Sequence[Tensor], codes: Tensor, error: Tensor, block_size: int) -> Tensor:
        """One pass of `descend`. error: target minus value of each code, kept up to date."""
        updated, change = torch.empty_like(codes), torch.empty_like(codes[:, :block_size])
        before, after, changes = (matrix.unbind(1) for matrix in (codes, updated, change))
        passed = change.unsqueeze(2).unbind(1)
        for start, stop in self._blocks(block_size):
            slope = torch.empty_like(error[:, start:stop], memory_format=torch.contiguous_format)
            for own, weights, made in zip(slope, pull, error, strict=True):
                torch.mm(weights[:, start:stop].T, made, out=own)
            slopes, pulls = slope.unbind(1), _within(pull, start, stop)
            steps, bounds = self._steps(start, stop), self._bounds(start, stop)
            for place, j in enumerate(range(start, stop)):
                _clamp(torch.addcdiv(before[j], slopes[place], steps[place], out=after[j]).round_(), bounds[place])
                torch.sub(after[j], before[j], out=changes[place]).mul_(steps[place])
                slope = slope.narrow(1, 1, stop - j - 1)
                slope.addcmul_(pulls[place], passed[place], value=-1)
            error[:, start:stop].sub_(change[:, : stop - start])
        return updated

    def restore(self, codes: Tensor) -> list[Tensor]:
        """Codes as they are stored: of each weight [out, in] int8 in its own order, zero point added back."""
        found = []
        for own, grid, order in zip(codes, self._grids, self._orders, strict=True):
            stored = torch.empty_like(own)
            stored[order] = own
            rows = stored.T.contiguous()
            if grid.zero_point is not None:
                groups: Tensor = rows.view(len(rows), grid.scale.shape[1], -1)
                groups += grid.zero_point.unsqueeze(-1)
            found.append(rows.to(torch.int8))
        return found

    def _steps(self, start: int, stop: int) -> Sequence[Tensor]:
        """The steps of the columns `start` to `stop`, each [batch, out]."""
        return self._by_column(self._scales, start, stop)

    def _bounds(self, start: int, stop: int) -> Sequence[_Bounds]:
        """The least and the largest code of each of the columns `start` to `stop`."""
        if self._zeros is None:
            return [(self._format.lowest, self._format.highest)] * (stop - start)
        zeros = self._by_column(self._zeros, start, stop)
        return [(self._format.lowest - zero, self._format.highest - zero) for zero in zeros]

    def _by_column(self, by_group: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """by_group: [batch, groups, out]; of each column what its group has."""
        if by_group.shape[1] == 1:
            return by_group.expand(-1, stop - start, -1).unbind(1)
        return by_group[self._weights, self._groups[:, start:stop]].unbind(1)

    def _blocks(self, block_size: int) -> Iterator[tuple[int, int]]:
        columns = self._target.shape[1]
        for start in range(0, columns, block_size):
            yield start, min(start + block_size, columns)


_Bounds = tuple[int, int] | tuple[Tensor, Tensor]


def _clamp(codes: Tensor, bounds: _Bounds) -> None:
    torch.clamp(codes, *bounds, out=codes)


def _within(matrices: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Of each row of the diagonal block `start` to `stop` what lies behind the diagonal, of all matrices: [batch, rest, 1]."""
    rows = torch.stack([matrix[start:stop, start:stop] for matrix in matrices]).unsqueeze(3).unbind(1)
    return [row.narrow(1, place + 1, stop - start - place - 1) for place, row in enumerate(rows)]
