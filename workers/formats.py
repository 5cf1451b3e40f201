"""How one quantized linear is stored: what the ledger says of it, and a loader must know beside its tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from counterweight.kernels.forms import ActivationFormat, WeightForm
from counterweight.workers.config import Config


class OnlineTransform(Config):
    """A Hadamard transform of a layer's input at inference: see `kernels.hadamard.Hadamard`, and `transforms.online`."""

    size: int = Field(ge=1)
    seed: int | None
    inner: int = Field(ge=1)


class ResidualFormat(Config):
    """How a linear's residual store is read: see `kernels.residual.Correction`."""

    bits: Literal[4]
    selection: Literal["chunked", "bucketed", "exact", "static"]
    channels_per_chunk: int = Field(ge=1, le=1024)


class ModuleFormat(Config):
    """How one quantized linear is stored: what a loader must know beside the tensors."""

    kind: str = Field(default="uniform", max_length=40)
    """How its weight is stored: see `kernels.weights`."""
    bits: int = Field(ge=1, le=8)
    group_size: int | None = Field(ge=1)
    symmetric: bool
    activation_bits: int | None = Field(ge=2, le=8)
    activation_clip: float = Field(default=1.0, gt=0, le=1)
    activation_group_size: int | None = Field(default=None, ge=1)
    rank: int = Field(ge=0, le=1 << 20)
    factor_bits: Literal[4, 8] | None = None
    online: OnlineTransform | None = None
    residual: ResidualFormat | None = None

    @property
    def weight(self) -> WeightForm:
        """What is to be known of the weight beside its tensors."""
        return WeightForm(kind=self.kind, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    @property
    def activations(self) -> ActivationFormat | None:
        """How the input is quantized, None when it is not."""
        if self.activation_bits is None:
            return None
        return ActivationFormat(
            bits=self.activation_bits, clip=self.activation_clip, group_size=self.activation_group_size
        )
