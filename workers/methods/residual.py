"""The residual store: what the rest left, to be fetched while decoding. `workers/compensation/residual.py` makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from counterweight.kernels.forms import CHUNK
from counterweight.workers import matrix_bytes
from counterweight.workers.config import Config, Method
from counterweight.workers.matrix_flops import Work, elementwise

if TYPE_CHECKING:
    from torch import Tensor

    from counterweight.kernels.residual import Correction
    from counterweight.workers.calibration.statistics import InputStatistics


class Bandwidths(Config):
    """A GPU as far as residuals are concerned, measured or from its data sheet."""

    dram: Annotated[float, Field(gt=0, le=1e6)]
    """Of its own memory, GB/s (10^9 bytes)."""
    pcie: Annotated[float, Field(gt=0, le=1e6)]
    """Of its way to the host's memory, GB/s."""
    multiprocessors: Annotated[int, Field(strict=True, ge=1, le=10_000)]
    """How many it has: no layer is worth measuring with more thread blocks. Times that are modelled do not depend on it."""


class LatencyBudget(Config):
    """As many channels as a GPU can fetch in time, layer by layer (DecDEC's tuner)."""

    slowdown: Annotated[float, Field(ge=0, le=1)]
    """Share by which all linear layers together may become slower at batch 1; 0 hides every fetch behind the weights' reads."""
    device: (
        Literal["RTX 4090", "RTX 4080 Super", "RTX 4070 Super", "RTX 4070 Mobile", "RTX 4050 Mobile", "H200"]
        | Bandwidths
    )
    """The GPU to be served on: one of which the data sheet is known, or its bandwidths."""


class Residual(Method):
    """What quantization left, stored in few bits outside the accelerator; while decoding, each token fetches the channels
    that matter most to it (DecDEC, Park et al. 2025)."""

    VERSION: ClassVar[int] = 1

    bits: Literal[4] = 4
    """Bits of a residual code; at equal traffic 2, 8 and 16 bits are worse (Park et al., 2025)."""
    channels_per_chunk: Annotated[int, Field(strict=True, ge=1, le=CHUNK)] | LatencyBudget = 8
    """How many input channels of every 1024 are corrected for each token; or what they may cost on a target GPU, and every
    layer gets as many as it can hide."""
    selection: Literal["chunked", "bucketed", "exact", "static"] = "chunked"
    """Which ones. chunked: the largest |x| of each 1024 channels, as our kernel finds them; bucketed: nearly those, as the
    paper's kernel does, by calibrated thresholds; exact: the largest of all channels; static: those of the largest E[x^2],
    the same for all tokens."""
    candidates: Annotated[int, Field(strict=True, ge=1, le=1000)] = 32
    """How many scales are tried for each output channel, evenly spaced up to the one that covers its whole range."""

    def channels(self, columns: int) -> int:
        """How many channels of a layer of `columns` input channels are corrected; at least 1. ValueError while they are a
        budget."""
        return max(1, self.per_chunk * columns // CHUNK)

    def store_bytes(self, rows: int, columns: int) -> int:
        """Memory of making a store at its peak, beside what quantization left [rows, columns] float32: codes in float32, then
        in int8 and packed; and the mean Gram matrix where its diagonal chooses the channels."""
        gram = 2 * matrix_bytes.SINGLE * columns * columns if self.selection == "static" else 0
        return max(gram, (matrix_bytes.SINGLE + 1) * rows * columns)

    def store_flops(self, rows: int, columns: int) -> Work:
        """Arithmetic of making a store: each candidate is divided by, rounded, clamped, multiplied out, subtracted, squared and
        summed."""
        gram = columns**2 if self.selection == "static" else 0
        return elementwise(gram + (6 + 7 * self.candidates) * rows * columns)

    @property
    def needs_products(self) -> bool:
        """Whether second moments of the input must be gathered, beside its thresholds."""
        return self.selection == "static"

    @property
    def per_chunk(self) -> int:
        """`channels_per_chunk` as a number; ValueError while it is a budget, which a plan of the whole model resolves."""
        if isinstance(self.channels_per_chunk, int):
            return self.channels_per_chunk
        raise ValueError(f"channels_per_chunk: {self.channels_per_chunk}: expected a number")

    @property
    def budget(self) -> LatencyBudget | None:
        """What channels may cost; None where their number is known."""
        return None if isinstance(self.channels_per_chunk, int) else self.channels_per_chunk

    def store(self, error: Tensor, statistics: InputStatistics) -> Correction | None:
        """The store of what is left of a weight, `error` [out, in], with its rule; None where no token reached the layer."""
        from counterweight.kernels.residual import Correction
        from counterweight.workers.compensation.residual import residual_store

        if statistics.thresholds is None:
            return None
        return Correction(
            store=residual_store(error, statistics.thresholds, self),
            selection=self.selection,
            channels_per_chunk=self.per_chunk,
            importance=statistics.mean_gram().diagonal().float() if self.selection == "static" else None,
        )
