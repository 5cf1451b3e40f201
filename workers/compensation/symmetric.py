"""Products that are known to be symmetric, in little more than half of the operations."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.workers.matrix_flops import block_of


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] times right [k, n], of one float dtype, whose product is symmetric: of each block of rows what lies left of
    the diagonal and the block on it, and the same mirrored. Exactly symmetric."""
    size = len(left)
    found, block = left.new_empty(size, size), block_of(size)
    for start in range(0, size, block):
        stop = min(start + block, size)
        torch.mm(left[start:stop], right[:, :stop], out=found[start:stop, :stop])
        found[:start, start:stop] = found[start:stop, :start].T
        corner = found[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return found
