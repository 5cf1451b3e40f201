"""The best low-rank approximation of what quantization left, for the inputs that the layer sees.

For the residual E = W - Q [out, in] and a metric G [in, in], the branch minimizes ||(E - up down) G^(1/2)||_F. By
Eckart-Young in the whitened space, with the left singular vectors U of E G^(1/2), a minimizer is

    up down = U_r U_r^T E,    error^2 = sum_{i>r} s_i^2.

U_r^T E takes the place of the usual "right factor times G^(-1/2)": it is the same matrix where G has an inverse and a
minimizer still where it has none, so no Gram matrix is too singular. G is I (LoRC, Yao et al. 2023; LQER), diag(E[x^2])
(QERA-approx, Zhang et al. 2024) or E[x x^T], for which the error is that of the layer's output (QERA-exact, and the same
solution under other names in ASER, Zhao et al. 2024, and EoRA, Liu et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import LowRank
from workers.calibration.statistics import InputStatistics
from workers.compensation.result import CompensationResult
from workers.quantization.inputs import checked_matrix, checked_statistics
from workers.quantization.result import Fallback
from workers.recipe.compensation import SVD


def deflated(options: SVD, statistics: InputStatistics, rows: int) -> InputStatistics:
    """The statistics with which to quantize a layer of `rows` outputs that this branch will follow.

    A branch that reads the r leading eigenvectors of G removes any error along them, so only the rest of G is left to
    the quantizer: G - anticipation * V_r diag(l_r) V_r^T. The leading ones, because what GPTQ pays is the sum of the
    squared pivots of G's Cholesky factor, whose product is the determinant: no other r directions lower it as much.
    (H-SVDQuant, 2026, deflates by the branch's own directions instead.) Layers may share a solve only if they have the
    same rank. Raises ValueError for statistics that are not finite and for a rank that the layer is too small for.
    """
    if not options.anticipates:
        return statistics
    gram = checked_statistics(statistics, statistics.width).gram
    values, vectors = torch.linalg.eigh(gram)
    rank = options.rank.resolve(rows, statistics.width, values)
    leading = vectors[:, -rank:]
    taken = (leading * (options.anticipation * values[-rank:].clamp_min(0))) @ leading.T
    return InputStatistics(gram=gram - taken, tokens=statistics.tokens)


def svd(
    options: SVD, residual_target: Tensor, statistics: InputStatistics | None, dtype: torch.dtype
) -> CompensationResult:
    """The branch for `residual_target` [out, in] = W - Q, with factors stored in `dtype`; computed in float64.

    statistics: of the layer's input; None only when whitening is `none`. Recorded fallbacks: no token (plain SVD), a
    residual of zero (no branch). Raises ValueError for a residual that is not a finite matrix, for statistics that are
    absent, not finite or of another width, and for a rank that the layer is too small for.
    """
    residual = checked_matrix("residual", residual_target).double()
    rows, columns = residual.shape
    root, fallbacks = _root(options, columns, statistics)
    whitened = _times(residual, root)
    energy = whitened.square().sum()
    if not bool(energy > 0):
        cause = "the residual is zero on every input that was seen: no branch"
        return CompensationResult(
            low_rank=None,
            captured=1.0,
            singular_values=energy.new_zeros(0),
            fallbacks=(*fallbacks, Fallback(step="svd.residual", cause=cause)),
        )
    values, vectors = _spectrum(whitened)
    low_rank = _factors(vectors[:, : options.rank.resolve(rows, columns, values)], residual, dtype)
    left = whitened - low_rank.up.double() @ _times(low_rank.down.double(), root)
    return CompensationResult(
        low_rank=low_rank,
        captured=1 - float(left.square().sum() / energy),
        singular_values=values,
        fallbacks=fallbacks,
    )


def _root(options: SVD, columns: int, statistics: InputStatistics | None) -> tuple[Tensor | None, tuple[Fallback, ...]]:
    """A root R of the metric, G = R R^T: [in, in], its diagonal [in], or None for the identity."""
    if options.whitening == "none":
        return None, ()
    gram = checked_statistics(statistics, columns).mean_gram()
    power = gram.diagonal()
    if not bool((power > 0).any()):
        return None, (Fallback(step="svd.tokens", cause="no calibration token arrived: plain residual"),)
    floor = options.damping * power.mean()
    if options.whitening == "diagonal":
        return (power + floor).sqrt(), ()
    damped = gram.clone()
    damped.diagonal().add_(floor)
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        # Fewer tokens than channels: semidefinite, so no Cholesky factor, but a root all the same.
        values, vectors = torch.linalg.eigh(damped)
        root = vectors * values.clamp_min(0).sqrt()
    return root, ()


def _times(matrix: Tensor, root: Tensor | None) -> Tensor:
    """`matrix` times the metric's root, in any of its three forms."""
    if root is None:
        return matrix
    return matrix * root if root.ndim == 1 else matrix @ root


def _spectrum(whitened: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and as many left singular vectors as columns, by way of the smaller Gram matrix."""
    rows, columns = whitened.shape
    if rows <= columns:
        squares, left = torch.linalg.eigh(whitened @ whitened.T)
        return squares.clamp_min(0).sqrt().flip(0), left.flip(1)
    squares, right = torch.linalg.eigh(whitened.T @ whitened)
    # QR keeps the columns orthonormal where dividing by a singular value of nearly zero would not.
    return squares.clamp_min(0).sqrt().flip(0), torch.linalg.qr(whitened @ right.flip(1)).Q


def _factors(left: Tensor, residual: Tensor, dtype: torch.dtype) -> LowRank:
    """The projection of `residual` on the columns of `left`; each direction's two factors have the same length.

    Equal lengths keep both factors far from the ends of float16's range.
    """
    right = left.T @ residual
    length = right.norm(dim=1).sqrt()
    length = torch.where(length > 0, length, 1.0)
    return LowRank(up=(left * length).to(dtype).contiguous(), down=(right / length.unsqueeze(1)).to(dtype).contiguous())
