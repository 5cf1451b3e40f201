"""Sums and differences of second moments, without a matrix of float64 for each step between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics

_STRIPS = {"cpu": 128, "cuda": 1024}
"""Rows that are added up at a time: on a CPU what is beside the result then stays in a cache, turned round or not."""


def signed_sum(terms: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    """The sum of matrices [n, n] float64, each times its sign (the first one's is 1), as a new one in `dtype`; added up in
    float64."""
    (_, first), *others = terms
    found = torch.empty(first.shape, dtype=dtype, device=first.device)
    step = _STRIPS.get(first.device.type, len(first))
    for start in range(0, len(first), step):
        rows = slice(start, start + step)
        total = first[rows]
        for sign, other in others:
            total = torch.add(total, other[rows], alpha=sign)
        found[rows] = total
    return found


def lost(statistics: InputStatistics, dtype: torch.dtype, streams: str = "xx") -> Tensor:
    """Sum over tokens of (a - y) (b - y)^T for two streams a and b, [in, in]."""
    first, second = streams[0], streams[1]
    product = statistics.product
    terms = [(1, product(streams)), (-1, product(f"{first}y")), (-1, product(f"y{second}")), (1, product("yy"))]
    return signed_sum(terms, dtype)


def difference(statistics: InputStatistics, streams: str, less: str, dtype: torch.dtype) -> Tensor:
    """A product of two streams less another one, such as `xy` and `yy`, [in, in]."""
    return signed_sum([(1, statistics.product(streams)), (-1, statistics.product(less))], dtype)
