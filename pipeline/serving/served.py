"""A compressed linear as an engine serves it: its tensors stay as small as the checkpoint has them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from counterweight.kernels.backend import Kernels, on_kernels
from counterweight.kernels.formats import LowRank
from counterweight.kernels.linear import CompensatedLinear, compensated_product
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.weights import StoredWeight, format_of
from counterweight.kernels.weights.packing import pack, unpack
from counterweight.workers.block import CompressedLinear


def served(layer: CompressedLinear, *, own: slice | None = None, kernels: Kernels = "auto") -> nn.Module:
    """A module for x [tokens, in] -> [tokens, out], on the device where the layer's tensors lie: Triton's kernels where they
    run, or `PackedLinear`. own: see there. kernels: see `kernels.backend`; residual stores and gathered tokens run on torch."""
    if own is None and layer.residual is None:
        module = on_kernels(linear_of(layer), kernels)
        if not isinstance(module, CompensatedLinear):
            return module
    return PackedLinear(layer, own=own)


def linear_of(layer: CompressedLinear) -> CompensatedLinear:
    """The layer in plain torch."""
    return CompensatedLinear(
        layer.weight,
        low_rank=layer.low_rank,
        activations=layer.activations,
        transform=layer.transform,
        residual=layer.residual,
    )


class PackedLinear(nn.Module):
    """What `CompensatedLinear` computes, from tensors that are packed between calls: a layer of 4 bits takes 4 bits a weight,
    and one dense weight at a time is made for the time of its product.

    own: of a row-parallel layer whose input was gathered: the channels of the whole token that this rank multiplies.
    """

    up: Tensor | None
    down: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None

    def __init__(self, layer: CompressedLinear, *, own: slice | None = None) -> None:
        super().__init__()
        self.activations, self.transform = layer.activations, layer.transform
        self.residual, self.own = layer.residual, own
        self._format, self._form = type(layer.weight), layer.weight.form
        self.out_features, self.in_features = layer.weight.shape
        self._names = tuple(layer.weight.tensors())
        for name, tensor in layer.weight.tensors().items():
            self.register_buffer(name, tensor)
        branch = layer.low_rank
        self._code_bits: Literal[4, 8] = 8 if branch is None else branch.code_bits
        if branch is not None and branch.code_bits == 4:
            self.register_buffer("up", pack(branch.up, 4, dim=0))
            self.register_buffer("down", pack(branch.down, 4))
        else:
            self.register_buffer("up", None if branch is None else branch.up)
            self.register_buffer("down", None if branch is None else branch.down)
        self.register_buffer("up_scale", None if branch is None else branch.up_scale)
        self.register_buffer("down_scale", None if branch is None else branch.down_scale)

    @property
    def weight(self) -> StoredWeight:
        """The weight, unpacked."""
        tensors = {name: self.get_buffer(name) for name in self._names}
        return format_of(self._format.kind).from_tensors(tensors, self._form)

    def forward(self, x: Tensor, decoded: Tensor | None = None) -> Tensor:
        """x [tokens, in], of a layer with `own` [tokens, channels of the whole token] -> [tokens, out].

        decoded: bool [tokens], those that a residual store corrects; None: none of them.
        """
        if self.transform is not None:
            x = self.transform.apply(x)
        inner = x if self.activations is None else fake_quantize_activations(x, self.activations)
        if self.own is not None:
            x, inner = x[:, self.own], inner[:, self.own]
        y = compensated_product(inner, x, self.weight, self._branch())
        if self.residual is None or decoded is None:
            return y
        for token in decoded.nonzero().flatten().tolist():
            y[token] += self.residual.apply(x[token : token + 1])[0].to(y.dtype)
        return y

    def _branch(self) -> LowRank | None:
        if self.up is None or self.down is None:
            return None
        up, down = self.up, self.down
        if self._code_bits == 4:
            up, down = unpack(up, 4, self.out_features, dim=0), unpack(down, 4, self.in_features)
        return LowRank(up=up, down=down, up_scale=self.up_scale, down_scale=self.down_scale, code_bits=self._code_bits)
