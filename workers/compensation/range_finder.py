"""The r leading left singular vectors of A = M G^(1/2), where r is a small part of them: without a root of G, and without
A's whole spectrum.

They are the leading eigenvectors of A A^T = M G M^T, which is only ever multiplied by a few columns. A randomized range finder
(Halko, Martinsson & Tropp, "Finding Structure with Randomness", SIAM Review 2011) with oversampling, whose power iteration is a
Chebyshev filter (Zhou, Saad, Tiago & Chelikowsky, 2006): a polynomial that is small below the smallest Ritz value and grows
fastest above it. Filters win less each time, so it ends behind one that has won less than `LEFT` of what the basis holds beside
the wanted directions. Products are taken in float32; the basis, its orthonormality and Rayleigh-Ritz are float64.

Error bound, which tests/workers/compensation/test_range_finder.py checks over flat, decaying, clustered and ill-conditioned
spectra: the vectors hold at least 1 - `CAPTURED` of the energy that the exact ones hold, and what they leave is at most
1 + `LEFT` times what the exact ones leave, plus `ROUNDING` of ||A||_F^2, float32's share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterweight.workers.matrix_flops import RANGE_DEGREE, RANGE_PRODUCTS, range_columns, squares_first

CAPTURED, LEFT, ROUNDING = 1e-3, 5e-3, 1e-6
_AMPLIFIED = 1e5
"""By how much a filter may raise the strongest direction over the weakest that is wanted: what float32 can hold of both."""


def leading(matrix: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values, descending, [rank] and left singular vectors [out, rank] of matrix gram^(1/2); float64.

    matrix: [out, in] float64. gram: [in, in] float64, semidefinite; None: the identity. Every call begins with the same random
    columns for a shape, so that a result has the same bits again.
    """
    narrow, metric = matrix.float(), None if gram is None else gram.float()
    rows, columns = matrix.shape
    count = range_columns(rank)
    square: Tensor | None = None
    if squares_first(rows, columns, rank, metric=metric is not None):
        square = _times(narrow, metric, narrow.T)

    def product(block: Tensor) -> Tensor:
        single = block.float()
        found = _times(narrow, metric, narrow.T @ single) if square is None else square @ single
        return found.double()

    start = torch.randn(rows, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start.to(matrix.device)).Q
    image, done, held = product(basis), 1, 0.0
    while True:
        small = basis.T @ image
        values, turn = torch.linalg.eigh((small + small.T) / 2)
        basis, image = basis @ turn, image @ turn
        before_it, held = held, float(values[-rank:].sum())
        degree = _degree(float(values[0]), float(values[-1]), RANGE_PRODUCTS - done)
        if degree == 0 or held - before_it <= max(LEFT * float(values[:-rank].sum()), ROUNDING * held):
            break
        cut = max(float(values[0]), float(values[-1]) / _AMPLIFIED**2)
        before, filtered = basis, image * (2 / cut) - basis
        for _ in range(degree - 1):
            before, filtered = filtered, (product(filtered) * (2 / cut) - filtered) * 2 - before
        basis = torch.linalg.qr(filtered).Q
        image, done = product(basis), done + degree
    return values[-rank:].clamp_min(0).sqrt().flip(0), basis[:, -rank:].flip(1)


def _degree(least: float, largest: float, left: int) -> int:
    """Of the next filter: as high as `RANGE_DEGREE`, the products that are `left` and `_AMPLIFIED` allow. 0: none."""
    if left == 0 or not largest > 0:
        return 0
    ratio = 2 * largest / max(least, largest / _AMPLIFIED**2) - 1
    allowed = int(math.acosh(_AMPLIFIED) / math.acosh(max(ratio, 1.001)))
    return max(1, min(RANGE_DEGREE, left, allowed))


def _times(matrix: Tensor, metric: Tensor | None, block: Tensor) -> Tensor:
    return matrix @ (block if metric is None else metric @ block)
