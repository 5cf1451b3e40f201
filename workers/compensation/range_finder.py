"""The r leading left singular vectors of A = M G^(1/2), where r is a small part of them: without A's whole spectrum.

They are the leading eigenvectors of A A^T = M G M^T, which is only ever multiplied by a few columns. Of a tall M those of
A^T A, which is smaller, are multiplied by A, with Cholesky's factor for the root. A randomized range finder (Halko, Martinsson
& Tropp, "Finding Structure with Randomness", SIAM Review 2011) with oversampling, whose power iteration is a Chebyshev filter
(Zhou, Saad, Tiago & Chelikowsky, 2006): a polynomial that is small below the smallest Ritz value and grows fastest above it.
Products are taken in float32; the basis, its orthonormality and Rayleigh-Ritz are float64.

With Ritz values t_i, residuals r_i = A A^T u_i - t_i u_i and the smallest Ritz value t_0, the wanted vectors miss about
sum_i |r_i|^2 / (t_i - t_0): perturbation of the second order, what lies outside the basis taken to be as strong as its weakest
direction. It ends where `SAFETY` times that is within the bound, and filters are as long as that takes.

Error bound, which tests/workers/compensation/test_range_finder.py checks over flat, decaying, clustered and ill-conditioned
spectra: the vectors hold at least 1 - `CAPTURED` of the energy that the exact ones hold, and what they leave is at most
1 + `LEFT` times what the exact ones leave, plus `ROUNDING` of ||A||_F^2, float32's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from counterweight.workers.compensation.symmetric import symmetric_product
from counterweight.workers.matrix_flops import RANGE_DEGREE, RANGE_PRODUCTS, range_columns, range_side

CAPTURED, LEFT, ROUNDING = 1e-3, 5e-3, 1e-6
SAFETY = 1.5
"""The estimate of what is missing is 0.66 to 1.1 times the truth over the tests' spectra."""
_AMPLIFIED = 1e5
"""By how much a filter may raise the strongest direction over the weakest that is wanted: what float32 can hold of both."""


def leading(matrix: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values, descending, [rank] and left singular vectors [out, rank] of A = matrix gram^(1/2); float64.

    matrix: [out, in] float64. gram: [in, in] float64, semidefinite; None: the identity. Every call begins with the same random
    columns for a shape, so that a result has the same bits again.
    """
    side, narrow = range_side(*matrix.shape, rank, metric=gram is not None), matrix.float()
    if side == "right":
        if gram is None:
            return _by_the_right(narrow, None, rank)
        root, failed = torch.linalg.cholesky_ex(gram)
        root = root.float()
        if not int(failed):
            return _by_the_right(narrow, root, rank)
        del root
    metric = None if gram is None else gram.float()
    if side == "left":
        return leading_of(symmetric_product(narrow if metric is None else narrow @ metric, narrow.T), rank)

    def product(block: Tensor) -> Tensor:
        seen = narrow.T @ block
        return narrow @ (seen if metric is None else metric @ seen)

    return _eigenvectors(product, narrow, None, rank)


def leading_of(square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same, given A A^T [out, out] float32."""
    return _eigenvectors(partial(torch.mm, square), square, float(square.trace()), rank)


def _by_the_right(matrix: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """`leading` of a tall matrix with a root [in, in] of gram, both float32: by the eigenvectors V of A^T A, which is [in, in],
    and an orthonormal basis of A V."""
    square = symmetric_product(matrix.T, matrix)
    if root is not None:
        square = symmetric_product(root.T, square @ root)
    values, right = leading_of(square, rank)
    narrow = right.float()
    return values, torch.linalg.qr((matrix @ (narrow if root is None else root @ narrow)).double()).Q


def _eigenvectors(
    multiply: Callable[[Tensor], Tensor], like: Tensor, total: float | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Roots of the `rank` largest eigenvalues, descending, and eigenvectors [n, rank], float64, of a symmetric matrix [n, n].

    multiply: what it makes of columns [n, m] float32. like: a matrix of n rows where it lies. total: its trace, None where
    that is not known.
    """

    def product(block: Tensor) -> Tensor:
        return multiply(block.float()).double()

    start = torch.randn(len(like), range_columns(rank), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start.to(like.device)).Q
    image, done = product(basis), 1
    while True:
        small = basis.T @ image
        values, turn = torch.linalg.eigh((small + small.T) / 2)
        basis, image = basis @ turn, image @ turn
        missing, allowed = _missing(values, basis, image, rank), _allowed(values, rank, total)
        excess = missing / allowed if missing > allowed else 0.0
        degree = _degree(values, rank, excess, RANGE_PRODUCTS - done)
        if degree == 0:
            return values[-rank:].clamp_min(0).sqrt().flip(0), basis[:, -rank:].flip(1)
        cut = max(float(values[0]), float(values[-1]) / _AMPLIFIED**2)
        before, filtered = basis, image * (2 / cut) - basis
        for _ in range(degree - 1):
            before, filtered = filtered, (product(filtered) * (2 / cut) - filtered) * 2 - before
        basis = torch.linalg.qr(filtered).Q
        image, done = product(basis), done + degree


def _missing(values: Tensor, basis: Tensor, image: Tensor, rank: int) -> float:
    """About the energy that the `rank` last Ritz vectors miss; see above."""
    wanted = values[-rank:]
    residuals = (image[:, -rank:] - basis[:, -rank:] * wanted).square_().sum(0)
    gaps = (wanted - values[0]).clamp_min(torch.finfo(values.dtype).tiny)
    return float((residuals / gaps).sum())


def _allowed(values: Tensor, rank: int, total: float | None) -> float:
    """How much may be missing by the bound. total: of all energy; where it is not known, what the basis holds beside the wanted
    directions stands for all that they leave, of which it is a part."""
    held, beside = float(values[-rank:].sum()), float(values[:-rank].sum())
    left = beside if total is None else max(total - held, beside)
    return max(min(CAPTURED * held, LEFT * left), ROUNDING * held) / SAFETY


def _degree(values: Tensor, rank: int, excess: float, left: int) -> int:
    """Of the next filter: as high as it takes to divide what is missing by twice its `excess` over what is allowed, as
    `RANGE_DEGREE`, the products that are `left` and `_AMPLIFIED` allow. 0: none."""
    largest = float(values[-1])
    if left == 0 or excess == 0:
        return 0
    cut = max(float(values[0]), largest / _AMPLIFIED**2)

    def growth(value: float) -> float:
        return math.acosh(max(2 * value / cut - 1, 1.001))

    needed = math.ceil(math.acosh((2 * excess) ** 0.5) / growth(float(values[-rank])))
    most = min(RANGE_DEGREE, left, int(math.acosh(_AMPLIFIED) / growth(largest)))
    return max(1, min(needed, most))
