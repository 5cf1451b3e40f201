"""What a manifest can ask of the residual store. Options only, without torch: `workers/compensation/residual.py` computes
with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from workers.config import Config

_CHUNK = 1024  # kernels/residual.py says the same, but imports torch


class Residual(Config):
    """What quantization left, stored in few bits outside the accelerator; while decoding, each token fetches the channels
    that matter most to it (DecDEC, Park et al. 2025)."""

    bits: Literal[4] = 4
    """Bits of a residual code; at equal traffic 2, 8 and 16 bits are worse (Park et al., 2025)."""
    channels_per_chunk: Annotated[int, Field(strict=True, ge=1, le=_CHUNK)] = 8
    """How many input channels of every 1024 are corrected for each token."""
    selection: Literal["chunked", "exact", "static"] = "chunked"
    """Which ones. chunked: nearly the largest |x| of each 1024 channels, as the kernel finds them; exact: the largest of all
    channels; static: those of the largest E[x^2], the same for all tokens."""
    candidates: Annotated[int, Field(strict=True, ge=1, le=1000)] = 32
    """How many scales are tried for each output channel, evenly spaced up to the one that covers its whole range."""

    def channels(self, columns: int) -> int:
        """How many channels of a layer of `columns` input channels are corrected; at least 1."""
        return max(1, self.channels_per_chunk * columns // _CHUNK)
