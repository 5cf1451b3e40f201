"""A matrix with a regression in it, M = E + (sum_k A_k D_k) G^-1 [out, in], by what it makes of a few columns: it is never
multiplied out, and G is solved with for these columns alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Regressed:
    """rest: E [out, in]; moved: each A [out, in] with its D [in, in]; metric: G [in, in]; root: its lower Cholesky factor. All
    of one float dtype, as the columns are that it is multiplied with."""

    rest: Tensor
    moved: Sequence[tuple[Tensor, Tensor]]
    metric: Tensor
    root: Tensor

    def squared(self, block: Tensor) -> Tensor:
        """M G M^T times [out, n]."""
        seen = self.metric @ (self.rest.T @ block) + self._regressed(block)
        found = self.rest @ seen
        if self.moved:
            solved = torch.cholesky_solve(seen, self.root)
            for matrix, product in self.moved:
                found += matrix @ (product @ solved)
        return found

    def transposed(self, block: Tensor) -> Tensor:
        """M^T times [out, n]."""
        found = self.rest.T @ block
        return found + torch.cholesky_solve(self._regressed(block), self.root) if self.moved else found

    def _regressed(self, block: Tensor) -> Tensor:
        """The sum of D^T A^T times [out, n]."""
        found = block.new_zeros(self.rest.shape[1], block.shape[1])
        for matrix, product in self.moved:
            found += product.T @ (matrix.T @ block)
        return found
