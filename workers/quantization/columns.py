"""The two loops over the columns of weights: error feedback and coordinate descent, blocked, in float32.

Weights of one shape go through the loops together, [batch, in, out]: a step is a handful of in-place operations, whose cost is
mostly that of the call where a weight is small. Each is transposed and permuted to its own order of rounding, so that a column
of a weight is a contiguous row. Columns of a block update each other at once; what lies outside the block is updated by one
matrix product per block and weight. What goes column by column is `kernels.columns`'s.

A weight's codes have the same bits in every batch: what is done to all weights at once is done entry by entry, and products
are those of one weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.columns import ColumnGrid, columns_at_once, descend_, feed_back_
from counterweight.workers.quantization.grid import Grid

SHORT_WIDTH = 1024
"""Columns below which one thread at a time goes column by column, while others do the rest of their solves: there an operation
is so short that threads wait for the interpreter instead of computing. Of a block of hidden 256 two threads take 0.18 CPU s as
one does, and 0.22 without a lock."""

_TURN = threading.Lock()


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
        self._turn = _TURN if columns < SHORT_WIDTH else nullcontext()
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
        for start, stop in self._blocks(block_size):
            with self._turn:
                feed_back_(
                    codes[:, start:stop],
                    error[:, start:stop],
                    target=self._target[:, start:stop],
                    aim=aim[:, start:stop],
                    feed=_within(feed, start, stop),
                    grid=self._grid(start, stop),
                )
            for own, weights, made in zip(aim, feed, error, strict=True):
                own[stop:].addmm_(weights[start:stop, stop:].T, made[start:stop])
        return codes

    def descend(self, pull: Sequence[Tensor], codes: Tensor, passes: int, block_size: int) -> Tensor:
        """Cyclic coordinate descent: each column in turn to its best codes given all the others; stops at a fixed point, where
        a further pass changes nothing."""
        error = torch.empty_like(codes)
        for start, stop in self._blocks(block_size):
            steps = self._grid(start, stop).steps
            torch.addcmul(self._target[:, start:stop], codes[:, start:stop], steps, value=-1, out=error[:, start:stop])
        for _ in range(passes):
            updated = self._sweep(pull, codes, error, block_size)
            if torch.equal(updated, codes):
                break
            codes = updated
        return codes

    def _sweep(self, pull: Sequence[Tensor], codes: Tensor, error: Tensor, block_size: int) -> Tensor:
        """One pass of `descend`. error: target minus value of each code, kept up to date."""
        updated = torch.empty_like(codes)
        for start, stop in self._blocks(block_size):
            slope = torch.empty_like(error[:, start:stop], memory_format=torch.contiguous_format)
            for own, weights, made in zip(slope, pull, error, strict=True):
                torch.mm(weights[:, start:stop].T, made, out=own)
            with self._turn:
                descend_(
                    updated[:, start:stop],
                    error[:, start:stop],
                    before=codes[:, start:stop],
                    slope=slope,
                    pull=_within(pull, start, stop),
                    grid=self._grid(start, stop),
                )
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

    def _grid(self, start: int, stop: int) -> ColumnGrid:
        """Of the columns `start` to `stop`."""
        return ColumnGrid(
            steps=self._by_column(self._scales, start, stop),
            zeros=None if self._zeros is None else self._by_column(self._zeros, start, stop),
            lowest=self._format.lowest,
            highest=self._format.highest,
        )

    def _by_column(self, by_group: Tensor, start: int, stop: int) -> Tensor:
        """by_group: [batch, groups, out]; of each column what its group has, [batch, columns, out]."""
        if by_group.shape[1] == 1:
            return by_group.expand(-1, stop - start, -1)
        return by_group[self._weights, self._groups[:, start:stop]]

    def _blocks(self, block_size: int) -> Iterator[tuple[int, int]]:
        columns, block = self._target.shape[1], columns_at_once(self._target.device, block_size)
        for start in range(0, columns, block):
            yield start, min(start + block, columns)


def _within(matrices: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """The diagonal block `start` to `stop` of all matrices, [batch, columns, columns]."""
    return torch.stack([matrix[start:stop, start:stop] for matrix in matrices])
