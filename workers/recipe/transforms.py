"""What a manifest can ask to be done to a block before it is quantized, without changing what the block computes.

Options only, without torch: `workers/transforms` computes with them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Method


class Rotation(Method):
    """Orthogonal rotations that spread outliers over all channels (QuaRot, Ashkboos et al. 2024).

    `residual` and `heads` are folded into the weights and cost nothing at inference; `online_down` and `online_output`
    are one fast Hadamard transform of the input of each down_proj and o_proj.
    """

    VERSION: ClassVar[int] = 1

    kind: Literal["rotation"] = "rotation"
    residual: bool = True
    """Rotates the residual stream, and with it the input of q, k, v, gate and up; fuses the norms. Not for Gemma."""
    heads: bool = True
    """Rotates the values of each attention head, and with them the input of o_proj, within the head."""
    online_down: bool = True
    """Rotates the input of down_proj, at inference."""
    online_output: bool = False
    """Rotates the input of o_proj across the heads, at inference; with `heads` that mixes all its channels."""
    random: bool = True
    """Whether the folded rotations flip random signs first. Online rotations do not: there it would cost something."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)] = 0
    """Seed of the signs: the same ones on every machine."""

    @model_validator(mode="after")
    def _rotates_something(self) -> Rotation:
        if not (self.residual or self.heads or self.online_down or self.online_output):
            raise ValueError("a rotation must set residual, heads, online_down or online_output, or it does nothing")
        return self

    @property
    def sign_seed(self) -> int | None:
        """Seed of the signs of folded rotations, None where they have none."""
        return self.seed if self.random else None

    def rotate_bytes(self, rows: int, columns: int) -> int:
        """Memory of rotating a weight [rows, columns] at its peak: in float64, behind a norm's weight, and two steps of a fast
        transform."""
        return 4 * matrix_bytes.DOUBLE * rows * columns


class Smoothing(Method):
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
    with the least output error of rounding on 512 calibration tokens."""

    def search_bytes(self, rows: int, columns: int) -> int:
        """Memory of choosing the scales of an input at its peak: its linears, [rows, columns] together, stacked in float32;
        each candidate scaled, rounded and read back."""
        found = 2 * matrix_bytes.SINGLE  # the stack, and its magnitudes or a candidate
        if self.strength == "search":
            found += 1 + matrix_bytes.DECODE
        return found * rows * columns


Transform = Annotated[Rotation | Smoothing, Field(discriminator="kind")]
"""A transform that leaves the output as it was."""
