"""Reduced-rank regression: the low-rank matrix that comes nearest to a target, on a given input.

For a target T = M X [out, tokens] and G = X X^T, every rank-r matrix L with the least ||T - L X||_F is

    L = U U^T M,    U: the r leading left singular vectors of M G^(1/2)          (Izenman, 1975; Eckart-Young in whitened space)

with T projected on X beforehand, M = T X^T G^-1, when it is not a product with X. All closed forms of this package are this
one: M = W - Q gives whitened SVD (QERA-exact, EoRA, ASER), M = W - Q E[y x^T] E[x x^T]^-1 LRC's Update-LR. U U^T M takes the
place of the usual "right factor times G^(-1/2)": it is the same matrix where G has an inverse and a minimizer still where it
has none, so no Gram matrix is too singular.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank


def root_of(gram: Tensor) -> Tensor:
    """A root R [in, in] of a semidefinite gram = R R^T [in, in] float64: Cholesky's, or where there is none (fewer tokens than
    channels) that of the eigenvectors."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt()
    return root


def stored(branch: LowRank, bits: int | None) -> LowRank:
    """The branch as it is kept: as it is, or with `bits` = 8 in integer codes, one step for each direction's two factors."""
    if bits is None:
        return branch
    up, down = branch.factors(torch.float32)
    highest = (1 << (bits - 1)) - 1
    up_scale = _step(up.abs().amax(0), highest)
    down_scale = _step(down.abs().amax(1), highest)
    return LowRank(
        up=(up / up_scale).round_().to(torch.int8),
        down=(down / down_scale.unsqueeze(1)).round_().to(torch.int8),
        up_scale=up_scale,
        down_scale=down_scale,
    )


def _step(largest: Tensor, highest: int) -> Tensor:
    return torch.where(largest > 0, largest / highest, 1.0)


def times(matrix: Tensor, root: Tensor | None) -> Tensor:
    """`matrix` times the metric's root, in any of its three forms."""
    if root is None:
        return matrix
    return matrix * root if root.ndim == 1 else matrix @ root


def spectrum(whitened: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and as many left singular vectors as columns, by way of the smaller Gram matrix."""
    rows, columns = whitened.shape
    if rows <= columns:
        squares, left = torch.linalg.eigh(whitened @ whitened.T)
        return squares.clamp_min(0).sqrt().flip(0), left.flip(1)
    squares, right = torch.linalg.eigh(whitened.T @ whitened)
    # QR keeps the columns orthonormal where dividing by a singular value of nearly zero would not.
    return squares.clamp_min(0).sqrt().flip(0), torch.linalg.qr(whitened @ right.flip(1)).Q


def factors(left: Tensor, residual: Tensor, dtype: torch.dtype) -> LowRank:
    """The projection of `residual` on the columns of `left`; each direction's two factors have the same length.

    Equal lengths keep both factors far from the ends of float16's range.
    """
    right = left.T @ residual
    length = right.norm(dim=1).sqrt()
    length = torch.where(length > 0, length, 1.0)
    return LowRank(up=(left * length).to(dtype).contiguous(), down=(right / length.unsqueeze(1)).to(dtype).contiguous())
