"""Reduced-rank regression: the low-rank matrix that comes nearest to a target, on a given input.

For a target T = M X [out, tokens] and G = X X^T, every rank-r matrix L with the least ||T - L X||_F is

    L = U U^T M,    U: the r leading left singular vectors of M G^(1/2)          (Izenman, 1975; Eckart-Young in whitened space)

with T projected on X beforehand, M = T X^T G^-1, when it is not a product with X. All closed forms of this package are this
one: M = W - Q gives whitened SVD (QERA-exact, EoRA, ASER), M = W - Q E[y x^T] E[x x^T]^-1 LRC's Update-LR. U U^T M takes the
place of the usual "right factor times G^(-1/2)": it is the same matrix where G has an inverse and a minimizer still where it
has none, so no Gram matrix is too singular.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.workers.compensation.range_finder import leading
from counterweight.workers.matrix_flops import finds_range
from counterweight.workers.methods.compensations.rank import Rank


def root_of(gram: Tensor) -> Tensor:
    """A root R [in, in] of a semidefinite gram = R R^T [in, in] float64: Cholesky's, or where there is none (fewer tokens than
    channels) that of the eigenvectors."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt()
    return root


_SHARES: dict[int, tuple[float, ...]] = {8: (1.0,), 4: tuple(1 - 0.05 * place for place in range(12))}
"""Bits -> shares of the largest magnitude that the codes may reach. 8 bits have no need to clip."""


def stored(branch: LowRank, bits: Literal[4, 8] | None) -> LowRank:
    """The branch as it is kept: as it is, or in integer codes of `bits`, one step for each direction's two factors: of the
    `_SHARES` the one with the least squared error."""
    if bits is None:
        return branch
    up, down = branch.factors(torch.float32)
    up_codes, up_scale = _coded(up.T, bits)
    down_codes, down_scale = _coded(down, bits)
    return LowRank(
        up=up_codes.T.contiguous(), down=down_codes, up_scale=up_scale, down_scale=down_scale, code_bits=bits
    )


def _coded(rows: Tensor, bits: Literal[4, 8]) -> tuple[Tensor, Tensor]:
    """Codes of `rows` [rank, n] in int8, and their steps [rank]."""
    highest = (1 << (bits - 1)) - 1
    largest = rows.abs().amax(1, keepdim=True)
    step, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for share in _SHARES[bits]:
        tried = torch.where(largest > 0, largest * share / highest, 1.0)
        codes = (rows / tried).round_().clamp_(-highest, highest)
        error = codes.mul_(tried).sub_(rows).square_().sum(1, keepdim=True)
        step, least = torch.where(error < least, tried, step), torch.minimum(error, least)
    return (rows / step).round_().clamp_(-highest, highest).to(torch.int8), step.squeeze(1)


def spectrum(whitened: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and as many left singular vectors as columns, by way of the smaller Gram matrix."""
    rows, columns = whitened.shape
    if rows <= columns:
        squares, left = torch.linalg.eigh(whitened @ whitened.T)
        return squares.clamp_min(0).sqrt().flip(0), left.flip(1)
    squares, right = torch.linalg.eigh(whitened.T @ whitened)
    # QR keeps the columns orthonormal where dividing by a singular value of nearly zero would not.
    return squares.clamp_min(0).sqrt().flip(0), torch.linalg.qr(whitened @ right.flip(1)).Q


def directions(matrix: Tensor, gram: Tensor | None, rank: Rank) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and the leading left singular vectors [out, r] of matrix gram^(1/2), r as `rank` asks.

    matrix: [out, in]; gram: [in, in], semidefinite, None for the identity; both float64. Where the rank is known ahead and
    small, only these are computed, within the error bound of `range_finder`. Raises ValueError for a rank that the matrix is
    too small for.
    """
    rows, columns = matrix.shape
    if rank.known_ahead:
        count = rank.resolve(rows, columns, matrix.new_empty(0))
        if finds_range(rows, columns, count, metric=gram is not None):
            return leading(matrix, gram, count)
    values, vectors = spectrum(matrix if gram is None else matrix @ root_of(gram))
    return values, vectors[:, : rank.resolve(rows, columns, values)]


def factors(left: Tensor, residual: Tensor, dtype: torch.dtype) -> LowRank:
    """The projection of `residual` [out, in] on the orthonormal columns of `left` [out, r]."""
    return balanced(left, left.T @ residual, dtype)


def balanced(left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
    """The product of `left` [out, r], whose columns have length 1, and `right` [r, in]: each direction's two factors have the
    same length, which keeps both far from the ends of float16's range."""
    length = right.norm(dim=1).sqrt()
    length = torch.where(length > 0, length, 1.0)
    return LowRank(up=(left * length).to(dtype).contiguous(), down=(right / length.unsqueeze(1)).to(dtype).contiguous())
