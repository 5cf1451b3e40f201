"""Source checkpoints whose weights are stored in fewer bits than they are read in: what the reader asks of an encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from counterweight.workers.checkpoint.dtypes import BF16, StoredDtype
from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.stacked import apart

DECODED = BF16
"""Of every encoded weight, as it is read."""


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """One weight. codes, scales: the tensors that hold it. decoded: its entry as readers see it, where its codes lie."""

    codes: TensorEntry
    scales: TensorEntry
    decoded: TensorEntry

    @classmethod
    def of(cls, codes: TensorEntry, scales: TensorEntry, name: str, shape: tuple[int, ...]) -> EncodedWeight:
        """A weight that is called `name` and has this shape when it is decoded."""
        return cls(codes, scales, replace(codes, name=name, dtype=DECODED, shape=shape))

    @property
    def stacked(self) -> bool:
        """Whether it holds one matrix after the other."""
        return len(self.decoded.shape) == 3

    def apart(self) -> list[EncodedWeight]:
        """Of a stacked weight: its matrices, [1, ...] each, which can be decoded by themselves."""
        return [
            EncodedWeight(*own) for own in zip(apart(self.codes), apart(self.scales), apart(self.decoded), strict=True)
        ]

    @property
    def parts(self) -> dict[str, str]:
        """Tensors that hold it under other names than its own -> what they are."""
        found = {self.codes.name: "codes", self.scales.name: "scales"}
        return {
            name: f"{what} of {self.decoded.name}, decoded with it"
            for name, what in found.items()
            if name != self.decoded.name
        }


class Encoding(Protocol):
    """How a source's weights are encoded, as headers show it; `decoding.decode` reads them."""

    @property
    def dtypes(self) -> Mapping[str, StoredDtype]:
        """The format's words for the dtypes that such a checkpoint may have."""

    def weights(self, entries: Mapping[str, TensorEntry]) -> dict[str, EncodedWeight]:
        """Encoded weights by name. CheckpointError, listing them, for those whose tensors are not whole."""
