"""Low-rank branches: what a compensated layer has beside its weight.

A value, not a module: a plain frozen dataclass of tensors that every storey can pass around. Weights are in `weights`; `linear`
computes with both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counterweight.kernels.weights.packing import packed_width


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A low-rank branch y += up @ (down @ x), applied to the layer's unquantized input.

    up: [out, rank], down: [rank, in], both in the dtype that the checkpoint stores; or int8 codes, with up_scale and
    down_scale, [rank] float32 each: one step per direction. code_bits: what a code takes in a checkpoint, where those of 4
    bits are packed; here each has a byte. Rank 0 is not represented: use None.
    """

    up: Tensor
    down: Tensor
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    code_bits: Literal[4, 8] = 8

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def bits(self) -> int:
        """Storage in a checkpoint, in bits."""
        steps = sum(8 * step.nbytes for step in (self.up_scale, self.down_scale) if step is not None)
        if steps == 0 or self.code_bits == 8:
            return 8 * (self.up.nbytes + self.down.nbytes) + steps
        words = packed_width(self.up.shape[0], self.code_bits) + packed_width(self.down.shape[1], self.code_bits)
        return 32 * self.rank * words + steps

    def to(self, device: torch.device) -> LowRank:
        """The same branch on another device."""
        return LowRank(
            up=self.up.to(device),
            down=self.down.to(device),
            up_scale=None if self.up_scale is None else self.up_scale.to(device),
            down_scale=None if self.down_scale is None else self.down_scale.to(device),
            code_bits=self.code_bits,
        )

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """up and down as numbers; codes are multiplied out in float32."""
        if self.up_scale is None or self.down_scale is None:
            return self.up.to(dtype), self.down.to(dtype)
        return (self.up * self.up_scale).to(dtype), (self.down * self.down_scale.unsqueeze(1)).to(dtype)

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The branch as a dense matrix [out, in], multiplied in float32."""
        up, down = self.factors(torch.float32)
        return (up @ down).to(dtype)
