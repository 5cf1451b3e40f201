"""Formats in which weights are stored, one file each. A further one is a file here and its class in `AnyWeights`."""

from __future__ import annotations

from counterweight.workers.methods.weights.sign import SignWeights
from counterweight.workers.methods.weights.stored import StoredWeights
from counterweight.workers.methods.weights.uniform import Weights

__all__ = ["AnyWeights", "SignWeights", "StoredWeights", "Weights"]

AnyWeights = Weights | SignWeights
"""On a uniform grid, or in the `format` that is named."""
