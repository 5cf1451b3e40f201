"""A layer's transform of its input at inference, from what the ledger says of it."""

from __future__ import annotations

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.formats import ModuleFormat


def hadamard(format: ModuleFormat) -> Hadamard | None:
    """None where there is none."""
    return None if format.online is None else Hadamard(**format.online.model_dump())
