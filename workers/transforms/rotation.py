"""Rotation: a model in other coordinates, where no channel is an outlier, with the same output.

QuaRot (Ashkboos et al. 2024). Vectors are rows, a linear computes y = x W^T + b, and for orthogonal R

    x W^T = (x R) (W R)^T,    rms(x R) = rms(x),

so whoever writes x may write x R, if whoever reads it has W R for W, and an RMSNorm in between commutes with R as soon as
its weight is moved into the linears that read it. Four rotations, each with `apply` on the last axis of whatever has x's
coordinates there (weights of readers; transposed weights and biases of writers):

- residual: the stream between blocks, [hidden]; written by the embedding, o and down, read through norms;
- heads: values within a head, [head_dim]; written by v, read by o. Attention mixes tokens, not channels;
- online across heads: o's input, and online, down's input: no linear writes them, so x R is computed at inference.

Products are computed in float64, by fast transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.errors import UnsupportedModelError
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import ModelFamily
from counterweight.workers.models.layout import ModelLayout


def residual_hadamard(width: int, options: Rotation) -> Hadamard:
    """The rotation of the residual stream [hidden], the same in every block."""
    return Hadamard(size=width, seed=options.sign_seed)


def residual_rotation(width: int, options: Rotation) -> Tensor:
    """`residual_hadamard` as a matrix Q [hidden, hidden] float64: the rotated stream is x Q."""
    return residual_hadamard(width, options).dense()


def rotate_block(
    model_type: str,
    parameters: Mapping[str, Tensor],
    options: Rotation,
    *,
    heads: int,
    key_value_heads: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[dict[str, Tensor], dict[str, Hadamard]]:
    """A block's parameters after rotation, in `dtype`, and the linears that need their input transformed at inference.

    parameters: names relative to the block -> tensors of any float dtype; weights are [out, in]. The result has the same
    names and shapes; with `options.residual` the norms before linears multiply by one and the block maps x Q to y Q.
    heads, key_value_heads: of the attention, as the config has them. device: where they are rotated, one after the other; each
    then lies where it lay, which is also the default. Raises UnsupportedModelError for an unknown
    model_type and for a residual rotation of a family that has none; ValueError when attention is not of that many heads.
    """
    family = family_of(model_type)
    if (problem := options.problem(family, model_type)) is not None:
        raise UnsupportedModelError(problem)
    block = _Block.of(family, parameters, options, heads, key_value_heads)
    rotated = {
        name: block.rotated(name, device or value.device).to(dtype).contiguous().to(value.device)
        for name, value in parameters.items()
    }
    modules = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    online = {module: transform for module in modules if (transform := block.online(module)) is not None}
    return rotated, online


def rotate_embedding(weight: Tensor, rotation: Hadamard | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The embedding [vocabulary, hidden] that writes the rotated stream: E Q."""
    return _times(weight.double(), rotation).to(dtype)


def rotate_head(
    norm_weight: Tensor,
    lm_head_weight: Tensor,
    rotation: Hadamard | Tensor,
    *,
    norm_offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The final norm [hidden], which now multiplies by one, and the lm_head [vocabulary, hidden] that reads the rotated stream.

    norm_offset: what the norm adds to its weight before it multiplies.
    A tied model is tied no longer: the lm_head takes the norm's weight in, and the embedding does not.
    """
    fused = lm_head_weight.double() * (norm_weight.double() + norm_offset)
    return torch.full_like(norm_weight, 1.0 - norm_offset, dtype=dtype), _times(fused, rotation).to(dtype)


def rotated_outside(
    tensors: Mapping[str, Tensor], rotation: Hadamard, layout: ModelLayout
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """What lies outside the blocks, rotated: the final norm with the lm_head (of a tied model: with the embedding that is its
    lm_head), or what writes the stream that enters the blocks: the embedding, or a multimodal model's projector among all that
    it has beside its text model. The tensors under their names, in their dtypes; and source -> what it is stored as."""
    norm, head = layout.names.norm, layout.names.head
    if norm not in tensors:
        rotated = {name: _writing(name, tensor, rotation, layout) for name, tensor in tensors.items()}
        return rotated, {name: (name,) for name in tensors}
    (source,) = tensors.keys() - {norm}
    offset, dtype = layout.family.norm_offset, tensors[source].dtype
    ones, fused = rotate_head(tensors[norm], tensors[source], rotation, norm_offset=offset, dtype=dtype)
    return {norm: ones.to(tensors[norm].dtype), head: fused}, {norm: (norm, head), source: (head,)}


def _writing(name: str, tensor: Tensor, rotation: Hadamard, layout: ModelLayout) -> Tensor:
    """A tensor outside the blocks, so that what it writes into the stream is rotated; most write none."""
    if name == layout.names.embedding:
        return rotate_embedding(tensor, rotation, dtype=tensor.dtype)
    if layout.writes_beside(name):  # weight [hidden, in] or bias [hidden]
        return rotate_embedding(tensor.movedim(0, -1), rotation, dtype=tensor.dtype).movedim(-1, 0).contiguous()
    return tensor


def _times(matrix: Tensor, rotation: Hadamard | Tensor) -> Tensor:
    if isinstance(rotation, Tensor):
        return matrix @ rotation.to(matrix)
    return rotation.apply(matrix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One block and its rotations; None for those that were not asked for, or that a block without attention has no use for.

    residual: [hidden]. head: [head_dim], of every head. across: [heads * head_dim], online. down: online, yes or no.
    value_rows: which rows of `family.value` are values, key_value_heads * head_dim of them.
    """

    family: ModelFamily
    parameters: Mapping[str, Tensor]
    residual: Hadamard | None
    head: Hadamard | None
    across: Hadamard | None
    down: bool
    value_rows: slice | list[int]

    @classmethod
    def of(
        cls, family: ModelFamily, parameters: Mapping[str, Tensor], options: Rotation, heads: int, key_value_heads: int
    ) -> _Block:
        hidden = next(
            len(value) for name, value in parameters.items() if family.writes_residual(name.removesuffix(".weight"))
        )
        residual = residual_hadamard(hidden, options) if options.residual else None
        if f"{family.output}.weight" not in parameters:
            return cls(
                family=family,
                parameters=parameters,
                residual=residual,
                head=None,
                across=None,
                down=options.online_down,
                value_rows=slice(0),
            )
        mixed = parameters[f"{family.output}.weight"].shape[1]
        written = parameters[f"{family.value}.weight"].shape[0]
        if mixed % heads or written < mixed // heads * key_value_heads or written % key_value_heads:
            raise ValueError(
                f"{family.output}: {mixed} input columns, {family.value}: {written} output rows: "
                f"expected those of {heads} heads and {key_value_heads} key-value heads"
            )
        head_dim = mixed // heads
        return cls(
            family=family,
            parameters=parameters,
            residual=residual,
            head=Hadamard(size=head_dim, seed=options.sign_seed) if options.heads else None,
            across=Hadamard(size=heads, inner=head_dim) if options.online_output else None,
            down=options.online_down,
            value_rows=family.value_rows(written, key_value_heads, key_value_heads * head_dim),
        )

    def rotated(self, name: str, device: torch.device) -> Tensor:
        """The parameter `name`, rotated, in float64 on `device`."""
        value = self.parameters[name].to(device, torch.float64)
        module, _, kind = name.rpartition(".")
        if module in self.family.reads:
            return value if self.residual is None else torch.full_like(value, 1.0 - self.family.norm_offset)
        if kind == "bias":
            return self._outputs(module, value)
        return self._outputs(module, self._inputs(module, value).T).T if value.ndim == 2 else value

    def online(self, module: str) -> Hadamard | None:
        """The transform of the input of `module` at inference."""
        if module == self.family.output:
            return self.across
        if self.down and self.family.is_down(module):
            return Hadamard(size=self.parameters[f"{module}.weight"].shape[1])
        return None

    def _inputs(self, module: str, weight: Tensor) -> Tensor:
        """weight [out, in] with its last axis in the coordinates that the input of `module` will have."""
        norm = self.family.norm_before(module)
        if self.residual is not None and norm in self.family.reads:
            scale = self.parameters[f"{norm}.weight"].to(weight) + self.family.norm_offset
            weight = self.residual.apply(weight * scale)
        if self.head is not None and module == self.family.output:
            weight = _by_head(weight, self.head)
        transform = self.online(module)
        return weight if transform is None else transform.apply(weight)

    def _outputs(self, module: str, values: Tensor) -> Tensor:
        """values [..., out] with its last axis in the coordinates that the output of `module` will have."""
        if self.residual is not None and self.family.writes_residual(module):
            values = self.residual.apply(values)
        if self.head is not None and module == self.family.value:
            values = values.clone()
            values[..., self.value_rows] = _by_head(values[..., self.value_rows], self.head)
        return values


def _by_head(values: Tensor, head: Hadamard) -> Tensor:
    """values [..., heads * head_dim], each head transformed by itself."""
    return head.apply(values.unflatten(-1, (-1, head.size))).flatten(-2)
