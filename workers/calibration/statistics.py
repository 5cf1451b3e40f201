"""Second moments of a layer's input, mergeable by addition, independent of who gathered them.

A statistic is gathered once per *distinct* input (q, k and v share one; gate and up share one). Tokens arrive in fixed
shards; products are taken in float32 within a shard and summed over shards in float64 in shard order, so the result has
the same bits however many workers or threads took part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TRIANGLE_BLOCK = 128
"""Columns per strip of the lower triangle. One Zen 4 core, float32, 4096 x 768: the full product takes 74 ms, strips of
64, 128, 192, 256 and 384 columns take 52, 32, 44, 35 and 54 ms (`benchmarks/gram.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Moments of the rows x [tokens, in] that entered a layer.

    gram: sum over tokens of x x^T, [in, in] float64, symmetric.
    tokens: number of rows summed.
    """

    gram: Tensor
    tokens: int

    @property
    def width(self) -> int:
        return int(self.gram.shape[0])

    @classmethod
    def of(cls, rows: Tensor) -> InputStatistics:
        """Statistics of the rows [..., in] of one shard."""
        accumulator = Accumulator(rows.shape[-1], rows.device)
        accumulator.add(ShardMoments.of(rows))
        return accumulator.result()

    def mean_gram(self) -> Tensor:
        """E[x x^T], [in, in] float64; zeros when no token was seen."""
        return self.gram / max(self.tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMoments:
    """One shard's contribution: only the lower triangle of `lower` [in, in] (float32) holds meaning."""

    lower: Tensor
    tokens: int

    @classmethod
    def of(cls, rows: Tensor) -> ShardMoments:
        """Moments of the rows [..., in] of one shard: float32 products, half of them (the matrix is symmetric)."""
        x = rows.reshape(-1, rows.shape[-1]).float()
        width = x.shape[1]
        lower = torch.zeros(width, width, device=x.device)
        for start in range(0, width, TRIANGLE_BLOCK):
            stop = min(start + TRIANGLE_BLOCK, width)
            torch.mm(x[:, start:stop].T, x[:, :stop], out=lower[start:stop, :stop])
        return cls(lower=lower, tokens=int(x.shape[0]))


class Accumulator:
    """Sums shards in the order in which they are added, in float64, holding one sum."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, shard: ShardMoments) -> None:
        """Adds one shard; ValueError when its width is another."""
        if shard.lower.shape != self._gram.shape:
            raise ValueError(
                f"a shard of width {shard.lower.shape[0]} cannot join statistics of width {self._gram.shape[0]}"
            )
        self._gram += shard.lower
        self._tokens += shard.tokens

    def result(self) -> InputStatistics:
        """The sum so far; zeros when nothing was added."""
        lower = self._gram.tril()
        return InputStatistics(gram=lower + lower.tril(-1).T, tokens=self._tokens)
