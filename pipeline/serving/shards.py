"""A compressed linear cut over tensor-parallel ranks.

A column-parallel layer (q, k, v, gate, up) gives each rank some of its output channels: rows of the weight and of the branch's
U; the input is whole. A row-parallel one (o, down) gives each rank some of its input channels: columns of the weight and of the
branch's D; ranks' outputs are added. What looks at a whole token, an online transform or the step of a quantized input, cannot
be computed from a rank's own channels: such a layer gathers the token first (`gathers`).
"""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.block import CompressedLinear


def rank_rows(layer: CompressedLinear, rows: slice) -> CompressedLinear:
    """The layer with these output channels alone. ValueError for a residual store."""
    _expect_no_store(layer)
    branch = layer.low_rank
    if branch is not None:
        branch = replace(branch, up=branch.up[rows].clone())
    return replace(layer, weight=layer.weight.rows(rows), low_rank=branch)


def rank_columns(layer: CompressedLinear, columns: slice) -> CompressedLinear:
    """The layer with these input channels alone; its transform and its quantization of inputs stay those of the whole token.
    ValueError for a residual store, and where a group of columns that share a scale would be cut."""
    _expect_no_store(layer)
    branch = layer.low_rank
    if branch is not None:
        branch = replace(branch, down=branch.down[:, columns].clone())
    return replace(layer, weight=layer.weight.columns(columns), low_rank=branch)


def gathers(layer: CompressedLinear, width: int) -> bool:
    """Whether a rank that has `width` input channels of this layer needs the others' to transform or quantize its own."""
    if layer.transform is not None:
        return True
    if layer.activations is None:
        return False
    return layer.activations.group_size is None or width % layer.activations.group_size != 0


def rank_slice(size: int, ranks: int, rank: int) -> slice:
    """The channels of `rank` when `size` of them are shared out evenly; ValueError where they cannot be."""
    if size % ranks:
        raise ValueError(f"{size} channels over {ranks} tensor-parallel ranks: expected a multiple")
    return slice(rank * (size // ranks), (rank + 1) * (size // ranks))


def _expect_no_store(layer: CompressedLinear) -> None:
    if layer.residual is not None:
        raise ValueError("residual store: expected one rank: its channels are chosen for a whole token on one device")
