"""The two loops over the columns of a weight: error feedback and coordinate descent, blocked, in float32.

Everything here is transposed to [in, out] and permuted to the order of rounding, so that a column of the weight is a
contiguous row, and a step of a loop is a handful of in-place operations on such rows. Columns of a block update each
other at once; what lies outside the block is updated by one matrix product per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.quantization.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The quadratic form of the output error in rounding order: hessian = root @ root.T, root upper triangular.

    Both [in, in] float64, damped.
    """

    hessian: Tensor
    root: Tensor


class Columns:
    """A weight's columns with the grid of each; codes are float32 [in, out], centred: the zero point is subtracted."""

    def __init__(self, weight: Tensor, grid: Grid, order: Tensor) -> None:
        """weight: [out, in] float32. order: [in], the column to be rounded first, second, ..."""
        self._order = order
        self._grid = grid
        self._target = weight.T[order].contiguous()
        groups = (order // grid.format.columns_per_group(weight.shape[1])).tolist()
        steps = grid.scale.float().T.contiguous().unbind(0)
        self._steps = [steps[group] for group in groups]
        low, high = grid.format.lowest, grid.format.highest
        self._range = (low, high)
        self._bounds: list[tuple[Tensor, Tensor]] | None = None
        if grid.zero_point is not None:
            zeros = grid.zero_point.float().T.contiguous()
            lows, highs = (low - zeros).unbind(0), (high - zeros).unbind(0)
            self._bounds = [(lows[group], highs[group]) for group in groups]

    def rounded(self, metric: Metric, refinement: int, block_size: int) -> Tensor:
        """Codes by error feedback, then by `refinement` passes of coordinate descent. The metric is used up: its matrices are
        divided in place."""
        return self.descend(metric, self.feed_back(metric, block_size), refinement, block_size)

    def feed_back(self, metric: Metric, block_size: int) -> Tensor:
        """Rounds each column to the value nearest to w_j + sum_{i<j} e_i U_ij / U_jj, e = w - q, in order."""
        feed = metric.root.div_(metric.root.diagonal().clone()).float()
        aim, codes, error = self._target.clone(), torch.empty_like(self._target), torch.empty_like(self._target)
        targets, aims, rounded, errors, feeds = (m.unbind(0) for m in (self._target, aim, codes, error, feed))
        for start, stop in self._blocks(block_size):
            for j in range(start, stop):
                step = self._steps[j]
                self._clamp(torch.div(aims[j], step, out=rounded[j]).round_(), j)
                torch.addcmul(targets[j], rounded[j], step, value=-1, out=errors[j])
                aim[j + 1 : stop].addr_(feeds[j][j + 1 : stop], errors[j])
            aim[stop:].addmm_(feed[start:stop, stop:].T, error[start:stop])
        return codes

    def descend(self, metric: Metric, codes: Tensor, passes: int, block_size: int) -> Tensor:
        """Cyclic coordinate descent: each column in turn to its best codes given all the others; stops at a fixed point."""
        pull = metric.hessian.div_(metric.hessian.diagonal().clone()).float()
        error = torch.empty_like(codes)
        for target, code, step, left in zip(self._target, codes, self._steps, error, strict=True):
            torch.addcmul(target, code, step, value=-1, out=left)
        for _ in range(passes):
            updated = self._sweep(pull, codes, error, block_size)
            if torch.equal(updated, codes):
                break
            codes = updated
        return codes

    def _sweep(self, pull: Tensor, codes: Tensor, error: Tensor, block_size: int) -> Tensor:
        """One pass of `descend`. pull: row j is H_jk / H_kk. error: target minus value of each code, kept up to date."""
        updated, change = torch.empty_like(codes), torch.empty_like(codes[0])
        before, after, errors, pulls = (matrix.unbind(0) for matrix in (codes, updated, error, pull))
        for start, stop in self._blocks(block_size):
            slope = pull[:, start:stop].T @ error
            slopes = slope.unbind(0)
            for j in range(start, stop):
                step = self._steps[j]
                self._clamp(torch.addcdiv(before[j], slopes[j - start], step, out=after[j]).round_(), j)
                torch.sub(after[j], before[j], out=change).mul_(step)
                errors[j].sub_(change)
                slope[j + 1 - start :].addr_(pulls[j][j + 1 : stop], change, alpha=-1)
        return updated

    def restore(self, codes: Tensor) -> Tensor:
        """Codes as they are stored: [out, in] int8 in the order of the weight, zero point added back."""
        stored = torch.empty_like(codes)
        stored[self._order] = codes
        rows = stored.T.contiguous()
        if self._grid.zero_point is not None:
            groups: Tensor = rows.view(len(rows), self._grid.scale.shape[1], -1)
            groups += self._grid.zero_point.unsqueeze(-1)
        return rows.to(torch.int8)

    def _clamp(self, code: Tensor, j: int) -> None:
        if self._bounds is None:
            code.clamp_(*self._range)
        else:
            torch.clamp(code, *self._bounds[j], out=code)

    def _blocks(self, block_size: int) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self._steps), block_size):
            yield start, min(start + block_size, len(self._steps))
