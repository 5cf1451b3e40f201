"""Scales of input channels. `workers/transforms/smoothing.py` has the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, hadamard, hadamard64, product
from counterweight.workers.methods.transforms.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from counterweight.kernels.forms import ActivationFormat
    from counterweight.kernels.hadamard import Hadamard


STRENGTHS = tuple(step / 20 for step in range(21))
"""Strengths that a search tries."""


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

    def search_flops(self, rows: int, columns: int, tokens: float, tried: Work, online: int | None) -> Work:
        """Arithmetic of choosing the scales of an input of which so many tokens are looked at, for its linears, [rows, columns]
        together. tried: of rounding them and that input once. online: order of the transform of the input, None without one."""
        entries, seen = rows * columns, tokens * columns
        # Both as they were before the transform, and their mean magnitudes.
        found = _undo(rows, columns, online) + _undo(tokens, columns, online) + elementwise(2 * (entries + seen))
        if self.strength != "search":
            return found
        # Scaled on both sides, multiplied, and the squared difference from the exact output summed.
        one = product(tokens, columns, rows) + elementwise(entries + seen + 3 * tokens * rows)
        if online is not None:
            one += hadamard(entries + seen, online)
        return found + product(tokens, columns, rows) + (one + tried) * len(STRENGTHS)

    def scale_flops(self, rows: float, columns: int, online: int | None) -> Work:
        """Arithmetic of scaling the columns of [rows, columns], likewise."""
        scaled = _undo(rows, columns, online) + elementwise(rows * columns)
        return scaled if online is None else scaled + hadamard(rows * columns, online)


def _undo(rows: float, columns: int, online: int | None) -> Work:
    """What a transform did to [rows, columns], undone by a dense product: its matrix is made each time, in float64."""
    return NOTHING if online is None else hadamard64(columns**2, online) + product(rows, columns, columns)
