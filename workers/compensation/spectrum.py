"""How what a low-rank branch adds to the output of its layer is spread over directions: whether its rank was ample or short."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank


def spectrum(branch: LowRank, x: Tensor) -> tuple[float, ...]:
    """Shares of ||X L^T||_F^2 that the best 1, 2, 4, ... and all directions of the branch L [out, in] hold, ascending to 1;
    empty where it adds nothing.

    x: tokens X [tokens, in] that enter the layer, of any float dtype. By Eckart-Young the best k directions hold the k largest
    squared singular values of X L^T = (X down^T) up^T, which are those of the product of both factors' triangles (QR). Products
    are float32, the triangles' product and its values float64.
    """
    up, down = branch.factors(torch.float32)
    inner, outer = x.float() @ down.T, up
    triangles = [torch.linalg.qr(factor, mode="r").R.double() for factor in (inner, outer)]
    energies = torch.linalg.svdvals(triangles[0] @ triangles[1].T).square()
    total = energies.sum()
    if not total > 0:
        return ()
    held = (energies.cumsum(0) / total).tolist()
    return tuple(held[min(count, len(held)) - 1] for count in counts(branch.rank))


def counts(rank: int) -> list[int]:
    """1, 2, 4, ... below a rank, and the rank: the directions that `spectrum` counts."""
    return [*(1 << power for power in range((rank - 1).bit_length())), rank]
