"""Symmetric matrices that are held by their lower triangle, in half the memory of the square."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TRIANGLE_BLOCK = 128
"""Rows per strip of the lower triangle. One Zen 4 core, float32, 4096 x 768: the full product takes 74 ms, strips of
64, 128, 192, 256 and 384 rows take 52, 32, 44, 35 and 54 ms (`benchmarks/gram.py`)."""


@dataclass(frozen=True, slots=True)
class LowerTriangle:
    """A symmetric matrix [width, width] by strips of `TRIANGLE_BLOCK` rows, one after the other in `entries`: of rows `start`
    to `stop` the first `stop` columns. What lies above the diagonal there has no meaning."""

    width: int
    entries: Tensor

    @classmethod
    def zeros(cls, width: int, dtype: torch.dtype, device: torch.device | str) -> LowerTriangle:
        """The matrix of zeros."""
        triangle = cls.empty(width, dtype, device)
        triangle.entries.zero_()
        return triangle

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, device: torch.device | str) -> LowerTriangle:
        """A matrix whose strips are to be filled."""
        count = sum((stop - start) * stop for start, stop in _strips(width))
        return cls(width, torch.empty(count, dtype=dtype, device=device))

    @classmethod
    def of(cls, square: Tensor) -> LowerTriangle:
        """The lower triangle of a matrix [width, width], in its dtype; what lies above the diagonal is not looked at."""
        triangle = cls.empty(len(square), square.dtype, square.device)
        for start, stop, strip in triangle.strips():
            strip.copy_(square[start:stop, :stop])
        return triangle

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes

    def strips(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, view [stop - start, stop] of the matrix) of each strip."""
        place = 0
        for start, stop in _strips(self.width):
            count = (stop - start) * stop
            yield start, stop, self.entries[place : place + count].view(stop - start, stop)
            place += count

    def add_(self, other: LowerTriangle, times: float = 1.0) -> None:
        """Adds another of the same width, of any float dtype, so many times."""
        for (_, _, own), (_, _, theirs) in zip(self.strips(), other.strips(), strict=True):
            own.add_(theirs, alpha=times)  # strip by strip: torch would make a copy of the whole in this dtype first

    def square(self) -> Tensor:
        """The whole matrix [width, width], exactly symmetric."""
        whole = self.entries.new_empty(self.width, self.width)
        for start, stop, strip in self.strips():
            whole[start:stop, :stop] = strip
            whole[:start, start:stop] = strip[:, :start].T
            corner = whole[start:stop, start:stop].tril()
            whole[start:stop, start:stop] = corner + corner.tril(-1).T
        return whole


def _strips(width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, width, TRIANGLE_BLOCK):
        yield start, min(start + TRIANGLE_BLOCK, width)
