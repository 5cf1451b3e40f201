"""How large the largest activations of a token are: what a residual store chooses its channels with."""

from __future__ import annotations

import torch
from torch import Tensor


class Thresholds:
    """For each rank 1 .. in, the largest magnitude that had that rank within a token (DecDEC's calibration).

    Maxima: any split of the tokens and any order of merging give the same bits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._largest = torch.zeros(width, device=device)

    @classmethod
    def of(cls, rows: Tensor) -> Tensor:
        """The thresholds of the tokens [..., in] of one shard."""
        seen = cls(rows.shape[-1], rows.device)
        seen.observe(rows)
        return seen.result()

    def observe(self, rows: Tensor) -> None:
        """Takes in tokens [..., in]; ValueError for another width and for values that are not finite."""
        width = self._largest.shape[0]
        if rows.shape[-1] != width:
            raise ValueError(f"rows: width {rows.shape[-1]}: expected {width}, the layer's input channels")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("rows: hold NaN or infinity: expected finite activations")
        if rows.numel():
            ranked = rows.reshape(-1, width).float().abs().sort(dim=1, descending=True).values
            torch.maximum(self._largest, ranked.amax(0), out=self._largest)

    def merge(self, other: Tensor) -> None:
        """Takes in the `result` [in] of other shards; ValueError for another width."""
        if other.shape != self._largest.shape:
            raise ValueError(
                f"thresholds of width {other.shape[0]} cannot join thresholds of width {self._largest.shape[0]}"
            )
        torch.maximum(self._largest, other, out=self._largest)

    def result(self) -> Tensor:
        """The thresholds so far, [in] float32, descending; zeros when no token was seen."""
        return self._largest.clone()
