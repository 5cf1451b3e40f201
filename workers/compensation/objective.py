"""The output error of a solved layer, E||W t - Q y - L x||^2, from second moments: t what enters the layer in the original
model, x here, y = Q(x), as in `lrc`.

Streams that are one are taken together. A term is a trace tr(A G B^T); cross terms come twice, and the branch's are taken
through its small factors, so that a layer costs three products with Gram matrices, not one for each two of its terms; of a
stream with itself half of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.matrix_flops import block_of


def energy(weight: Tensor, statistics: InputStatistics) -> float:
    """E||W t||^2 times the tokens: the square of the original output, summed over them. weight: [out, in]."""
    return _square(weight, statistics.product("tt"))


def squared_error(weight: Tensor, codes: Tensor, branch: LowRank | None, statistics: InputStatistics) -> float:
    """E||W t - Q y - L x||^2 times the tokens, both matrices [out, in]."""
    _, plain, compensated = squared_errors(weight, codes, branch, statistics)
    return plain if compensated is None else compensated


def squared_errors(
    weight: Tensor, codes: Tensor, branch: LowRank | None, statistics: InputStatistics
) -> tuple[float, float, float | None]:
    """`energy`, and `squared_error` without and with the branch, None where there is none; in the matrices' dtype but for the
    sums."""
    unit = energy(weight, statistics)
    if statistics.streams == {"x"}:
        # One stream: the sum is one square, without the rounding of differences.
        left, gram = weight - codes, statistics.product("xx")
        plain = max(_square(left, gram), 0.0)
        if branch is None:
            return unit, plain, None
        rest = left - branch.product(weight.dtype)
        return unit, plain, max(_square(rest, gram), 0.0)
    crossed = _trace(weight, statistics.product("ty"), codes)
    plain = unit - 2 * crossed + _square(codes, statistics.product("yy"))
    if branch is None:
        return unit, max(plain, 0.0), None
    up, down = branch.factors(weight.dtype)
    # What the branch reads of the streams that there are.
    read = {stream: down @ statistics.product(f"x{stream}").to(weight.dtype) for stream in statistics.streams}
    shared = read.get("t", read["x"]) @ weight.T - read.get("y", read["x"]) @ codes.T
    gained = 2 * _dot(shared.T, up) - _dot(read["x"] @ down.T, up.T @ up)
    return unit, max(plain, 0.0), max(plain - gained, 0.0)


def _trace(first: Tensor, gram: Tensor, second: Tensor) -> float:
    """tr(A G B^T)."""
    return _dot(first @ gram.to(first.dtype), second)


def _square(matrix: Tensor, gram: Tensor) -> float:
    """tr(A G A^T) of a symmetric G: of each block of its rows what lies left of the diagonal, which counts twice, and the block
    on it."""
    total, block = torch.zeros((), dtype=torch.float64, device=matrix.device), block_of(len(gram))
    for start in range(0, len(gram), block):
        stop = min(start + block, len(gram))
        strip = gram[start:stop, :stop].to(matrix.dtype, copy=True)
        strip[:, :start] *= 2
        total += ((matrix[:, :stop] @ strip.T) * matrix[:, start:stop]).sum(dtype=torch.float64)
    return float(total)


def _dot(first: Tensor, second: Tensor) -> float:
    """The sum of the products of entries, in float64."""
    return float((first * second).sum(dtype=torch.float64))
