"""What a solver hands back, and how it says that it could not do exactly what was asked."""

from __future__ import annotations

from dataclasses import dataclass

from counterweight.kernels.weights import StoredWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """A departure from the recipe that the data made necessary.

    step: which part of which algorithm departed, a stable identifier such as `gptq.damping`. cause: one clause with the
    figures, for the report.
    """

    step: str
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationResult:
    """Codes and grid of one weight, with every departure from the recipe that led to them."""

    weight: StoredWeight
    fallbacks: tuple[Fallback, ...] = ()
