"""Scales of input channels. `workers/transforms/smoothing.py` has the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from counterweight.workers import matrix_bytes
from counterweight.workers.methods.transforms.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from counterweight.kernels.formats import ActivationFormat
    from counterweight.kernels.hadamard import Hadamard


class Smoothing(Transform):
    """Input channels that are large are scaled down where the norm or the linear before can do it, and their weights up
    (SmoothQuant, Xiao et al. 2022; with weight-only recipes AWQ, Lin et al. 2023).

    Channel j is divided by E|x_j|**strength / mean|w_j|**(1 - strength), scaled to a geometric mean of one. Inputs that
    nothing before can scale stay as they are: o_proj with grouped queries, experts that share their input with a router. An
    online rotation comes behind the scales.
    """

    VERSION: ClassVar[int] = 1

    kind: Literal["smoothing"] = "smoothing"
    strength: Annotated[float, Field(strict=True, gt=0, le=1)] | Literal["search"] = "search"
    """How much moves from activations to weights; `search` finds, for each distinct input, the strength among 0, 0.05, .. 1
    with the least output error of rounding on tokens of the first shard, evenly spaced, fewer than 1,024."""

    @property
    def of_an_input(self) -> Smoothing:
        return self

    def scales(
        self,
        weights: Sequence[Tensor],
        rows: Tensor,
        nearest: Callable[[Tensor], Tensor],
        activations: ActivationFormat | None,
        transform: Hadamard | None,
    ) -> Tensor:
        """By what an input is divided, [in] float64: `migration_scales`."""
        from counterweight.workers.transforms.smoothing import migration_scales

        return migration_scales(self, weights, rows, nearest, activations, transform)

    def search_bytes(self, rows: int, columns: int) -> int:
        """Memory of choosing the scales of an input at its peak: its linears, [rows, columns] together, stacked in float32;
        each candidate scaled, rounded and read back."""
        found = 2 * matrix_bytes.SINGLE  # the stack, and its magnitudes or a candidate
        if self.strength == "search":
            found += 1 + matrix_bytes.DECODE
        return found * rows * columns
