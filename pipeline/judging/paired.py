"""Paired tests: are a compressed model's answers to the same items worse than the original's, or is that chance?"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

DRAWS = 10_000
"""Resamples of a bootstrap."""


def p_value(original: Sequence[float], compressed: Sequence[float]) -> float:
    """One-sided: how likely a drop (numbers of which more is better) at least as large would be if both were equally good.

    Of items that are right or wrong McNemar's exact test (1947), of others a bootstrap of the paired differences (Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 16). 1 without items. ValueError where they are not pairs.
    """
    if len(original) != len(compressed):
        raise ValueError(f"{len(original)} and {len(compressed)} items: expected as many of both")
    if not original:
        return 1.0
    if all(value in (0.0, 1.0) for value in (*original, *compressed)):
        pairs = list(zip(original, compressed, strict=True))
        return mcnemar(lost=pairs.count((1.0, 0.0)), won=pairs.count((0.0, 1.0)))
    return bootstrap([one - other for one, other in zip(original, compressed, strict=True)])


def mcnemar(*, lost: int, won: int) -> float:
    """P(X >= lost) of X binomial with lost + won trials of probability 1/2: items that only one of the two got right."""
    trials = lost + won
    favourable = sum(comb(trials, count) for count in range(lost, trials + 1))
    return favourable / (1 << trials)  # of integers, exact up to the division


def bootstrap(drops: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> float:
    """Share of resamples, of the differences shifted to a mean of zero, whose mean is at least the mean that was found."""
    values = np.asarray(drops, dtype=np.float64)
    mean = values.mean()
    if mean <= 0:
        return 1.0
    generator = np.random.default_rng(seed)
    centred = values - mean
    beyond = 0
    for _ in range(draws):
        beyond += bool(generator.choice(centred, size=len(values)).mean() >= mean)
    return (beyond + 1) / (draws + 1)
