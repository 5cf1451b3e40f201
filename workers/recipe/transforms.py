"""What a manifest can ask to be done to a block before it is quantized, without changing what the block computes.

Options only, without torch: `workers/transforms` computes with them.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from workers.config import Config


class Rotation(Config):
    """Orthogonal rotations that spread outliers over all channels (QuaRot, Ashkboos et al. 2024).

    `residual` and `heads` are folded into the weights and cost nothing at inference; `online_down` and `online_output`
    are one fast Hadamard transform of the input of each down_proj and o_proj.
    """

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
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
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


Transform: TypeAlias = Rotation
"""A transform that leaves the output as it was; the union of all kinds, told apart by `kind`."""
