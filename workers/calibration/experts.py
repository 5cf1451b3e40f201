"""How experts are calibrated that the router sends few tokens. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar

from pydantic import Field

from counterweight.workers.config import Method

_Multiple = Annotated[float, Field(ge=0, le=64)]


class ExpertCalibration(Method):
    """Calibration of a sparse MLP's experts. An expert below its floor is solved on its own tokens and, in proportion, on
    tokens of its layer that the router sent elsewhere. `benchmarks/experts.py` chose the defaults.
    """

    VERSION: ClassVar[int] = 1

    floor: _Multiple = 2.0
    """Tokens that a linear of an expert has to see, as a multiple of its input width; 0: what comes is enough."""
    strength: Annotated[float, Field(gt=0, le=64)] = 1.0
    """Below the floor, what the layer's tokens weigh in all: as many of the expert's own as this multiple of the input width.
    """
    sample: Annotated[float, Field(gt=0, le=256)] = 16.0
    """Tokens of the layer that an expert below its floor is run on, as a multiple of the hidden size, evenly spaced."""
    every_token: bool = False
    """Calibrate each expert on every token, whatever the router says: as many times the arithmetic as there are experts for one
    that a token sees. The model still routes as it does.
    """

    @property
    def samples(self) -> bool:
        """Whether tokens of the layer are kept for experts below the floor."""
        return self.floor > 0 and not self.every_token

    def floor_of(self, width: int) -> int:
        """Tokens that a linear with inputs of this width has to see."""
        return ceil(self.floor * width)

    def lacking(self, width: int, tokens: float) -> bool:
        """Whether so many tokens are too few for a linear with inputs of this width, and something is added to them."""
        return self.samples and tokens < self.floor_of(width)

    def weight_of(self, width: int) -> int:
        """What the layer's tokens weigh in the statistics of a linear with inputs of this width, in tokens of its own."""
        return max(1, round(self.strength * width))

    def rows_of(self, hidden: int) -> int:
        """Tokens of the layer that are kept at most."""
        return max(1, round(self.sample * hidden))

    def kept_of(self, hidden: int, tokens: int) -> int:
        """How many of so many tokens are kept: every s-th, s the smallest power of two for which they are few enough."""
        step = 1
        while -(-tokens // step) > self.rows_of(hidden):
            step *= 2
        return -(-tokens // step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Starvation:
    """A linear of an expert that saw too little. tokens: that the router sent. drawn: how many of these are of sequences that
    were drawn for such experts; None: none were. floor: tokens that were wanted. rows: of the layer that the expert was run on
    beside. weight: of these rows together, in tokens."""

    tokens: int
    drawn: int | None = None
    floor: int
    rows: int
    weight: int

    @property
    def cause(self) -> str:
        """In words, with the figures."""
        drawn = "" if self.drawn is None else f", {self.drawn} of them from drawn sequences"
        return (
            f"{self.tokens} of {self.floor} tokens{drawn}: statistics shrunk toward {self.rows} tokens of the layer, which "
            f"weigh as much as {self.weight}"
        )
