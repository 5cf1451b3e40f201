"""LRC on many kinds of input: a larger rank never hurts, and GPTQ with whitened SVD of the same rank is never better."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.lrc import lrc
from counterweight.workers.methods.compensations import LRC, SVD
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.weights import Weights
from tests.workers.kinds import KINDS, Layer

RANKS = (3, 10, 29, 58, 96)
WEIGHTS = Weights(bits=4)
FLOOR = 1e-9
"""Relative error below which only the rounding of stored factors is left."""


def joint(layer: Layer, rank: int) -> tuple[float, float]:
    """Relative errors of LRC on the tokens that were seen and on others."""
    (found,) = lrc(
        LRC(rank=CountRank(count=rank)),
        WEIGHTS,
        [(layer.weight, layer.statistics)],
        scale_dtype=torch.float32,
        factor_dtype=torch.float32,
    )
    codes, branch = found.weight.dequantize(), found.low_rank.product(torch.float64)
    return layer.error(layer.seen, codes, branch), layer.error(layer.unseen, codes, branch)


def separate(layer: Layer, rank: int) -> tuple[float, float]:
    """The same of GPTQ, followed by whitened SVD."""
    metric = InputStatistics(gram=layer.statistics.product("yy"), tokens=layer.statistics.tokens)
    codes = WEIGHTS.quantize(layer.weight, metric, scale_dtype=torch.float32).weight.dequantize()
    fitted = SVD(rank=CountRank(count=rank)).fit(layer.weight - codes, layer.statistics, dtype=torch.float32).low_rank
    branch = None if fitted is None else fitted.product(torch.float64)
    return layer.error(layer.seen, codes, branch), layer.error(layer.unseen, codes, branch)


@pytest.mark.parametrize("bits", [4, 6, 8, None], ids=["A4", "A6", "A8", "A16"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_never_hurt_and_nothing_is_lost_against_svd(kind: str, bits: int | None) -> None:
    layer = Layer(kind, bits=bits)
    found = [joint(layer, rank) for rank in RANKS]
    for lower, higher in pairwise(found):
        for before, after in zip(lower, higher, strict=True):
            assert after <= before + FLOOR
    for rank, errors in zip(RANKS, found, strict=True):
        for ours, theirs in zip(errors, separate(layer, rank), strict=True):
            assert ours <= 1.02 * theirs + FLOOR, rank
