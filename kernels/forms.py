"""What the parts of a compensated layer are beside their tensors: plain values, without torch.

A plan, a ledger and a manifest speak of them too. The parts themselves are in `weights`, `formats` and `residual`.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 1024
"""Input channels among which one thread block chooses those that a residual store corrects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightForm:
    """What a loader must know of a stored weight beside its tensors.

    kind: of `StoredWeight.kind`. bits: of a code. group_size: input columns that share a scale; None: one scale per output
    channel. symmetric: whether there are no zero points.
    """

    kind: str = "uniform"
    bits: int
    group_size: int | None = None
    symmetric: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationFormat:
    """Dynamic, symmetric quantization of a layer's input. bits of a code; clip: share of the largest magnitude that codes
    reach; group_size: channels of a token that share a scale, or None for one scale per token."""

    bits: int
    clip: float = 1.0
    group_size: int | None = None
