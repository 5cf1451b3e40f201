"""Rotations of a model's coordinates. `workers/transforms/rotation.py` has the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, hadamard, hadamard64
from counterweight.workers.methods.transforms.transform import Transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.kernels.hadamard import Hadamard
    from counterweight.workers.models.family import ModelFamily
    from counterweight.workers.models.layout import ModelLayout


class Rotation(Transform):
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

    @model_validator(mode="after")
    def _seeds_signs(self) -> Rotation:
        if self.seed and not (self.random and (self.residual or self.heads)):
            raise ValueError(f"seed: {self.seed}: expected 0 unless random, and residual or heads: there are no signs")
        return self

    @property
    def sign_seed(self) -> int | None:
        """Seed of the signs of folded rotations, None where they have none."""
        return self.seed if self.random else None

    @property
    def of_the_model(self) -> Rotation:
        return self

    @property
    def unties(self) -> bool:
        """Whether a head that was the embedding becomes a matrix of its own."""
        return self.residual

    def problem(self, family: ModelFamily, model_type: str) -> str | None:
        """Why a model of this family cannot be rotated like this; None where it can."""
        if self.residual and family.obstacle is not None:
            stream = f"whose residual stream cannot be rotated: {family.obstacle}"
            return f"rotation.residual: true: expected false for {model_type}, {stream}"
        if self.heads and family.value_obstacle is not None:
            values = f"whose values cannot be rotated: {family.value_obstacle}"
            return f"rotation.heads: true: expected false for {model_type}, {values}"
        return None

    def block(
        self,
        model_type: str,
        parameters: Mapping[str, Tensor],
        heads: int,
        key_value_heads: int,
        device: torch.device | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Hadamard]]:
        """A block's parameters after rotation, float32, and the transforms of linears' inputs at inference: `rotate_block`."""
        from counterweight.workers.transforms.rotation import rotate_block

        return rotate_block(model_type, parameters, self, heads=heads, key_value_heads=key_value_heads, device=device)

    def embedding(self, weight: Tensor) -> Tensor:
        """The embedding [vocabulary, hidden] as it writes the stream, float32 where it is another."""
        from counterweight.workers.transforms.rotation import residual_hadamard, rotate_embedding

        return rotate_embedding(weight, residual_hadamard(weight.shape[1], self)) if self.residual else weight

    def outside(
        self, tensors: Mapping[str, Tensor], layout: ModelLayout
    ) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
        """What lies outside the blocks, in its dtypes, and source -> what it is stored as: `rotated_outside`."""
        from counterweight.workers.transforms.rotation import residual_hadamard, rotated_outside

        if not self.residual:
            return dict(tensors), {name: (name,) for name in tensors}
        return rotated_outside(tensors, residual_hadamard(layout.hidden_size, self), layout)

    def rotate_bytes(self, rows: int, columns: int) -> int:
        """Memory of rotating a weight [rows, columns] at its peak: in float64, behind a norm's weight, and two steps of a fast
        transform."""
        return 4 * matrix_bytes.DOUBLE * rows * columns

    def rotate_flops(self, family: ModelFamily, module: str, rows: int, columns: int, heads: int, head: int) -> Work:
        """Arithmetic of rotating the weight [rows, columns] of `module`, in float64. heads: attention's, of queries; head:
        width of one."""
        entries = rows * columns
        signs = elementwise(entries) if self.random else NOTHING
        found = NOTHING
        if self.residual and family.norm_before(module) in family.reads:
            found += hadamard64(entries, columns) + signs + elementwise(entries)  # behind the norm's weight
        if self.residual and family.writes_residual(module):
            found += hadamard64(entries, rows) + signs
        if self.heads and module in (family.output, family.value):
            found += hadamard64(entries, head) + signs
        online = self.online_size(family, module, columns, heads)
        return found if online is None else found + hadamard64(entries, online)

    def online_flops(self, family: ModelFamily, module: str, elements: float, columns: int, heads: int) -> Work:
        """Arithmetic of transforming so many `elements` of the input [..., columns] of `module` at inference."""
        online = self.online_size(family, module, columns, heads)
        return NOTHING if online is None else hadamard(elements, online)

    def online_size(self, family: ModelFamily, module: str, columns: int, heads: int) -> int | None:
        """Order of the transform of the input [..., columns] of `module` at inference; None without one."""
        if module == family.output:
            return heads if self.online_output else None
        return columns if self.online_down and family.is_down(module) else None
