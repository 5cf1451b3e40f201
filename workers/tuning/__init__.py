"""Quantization learned block by block, by gradient descent on the block's output error."""

from __future__ import annotations

from counterweight.workers.tuning.lsi import LinearFormat, TuningResult, tune

__all__ = ["LinearFormat", "TuningResult", "tune"]
