"""The uniform grid of a weight, and the searches that choose its scales.

A grid gives each group of input columns of each row the values (code - zero_point) * scale, for the codes
-2**(bits-1) .. 2**(bits-1) - 1. Scales are rounded to the dtype in which they are stored before anything is computed
with them, zero points included, so what is searched and solved with is what will be loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.scales import STRIDE, MeanSquare


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Scales and zero points of a weight, as the checkpoint will store them, or of several weights of one shape.

    scale: [..., out, groups] in the stored dtype, never zero. zero_point: [..., out, groups] int8, None when symmetric.
    """

    format: WeightFormat
    scale: Tensor
    zero_point: Tensor | None

    def unbind(self) -> list[Grid]:
        """The grids [out, groups] of a batch [batch, out, groups]."""
        zeros = (None,) * len(self.scale) if self.zero_point is None else self.zero_point.unbind()
        return [
            Grid(format=self.format, scale=scale, zero_point=zero)
            for scale, zero in zip(self.scale.unbind(), zeros, strict=True)
        ]

    def round(self, weight: Tensor) -> UniformWeight:
        """Each entry of `weight` [out, in] float32 to its nearest grid value."""
        rows, columns = weight.shape
        grouped = weight.reshape(rows, self.scale.shape[1], -1)
        offset = 0 if self.zero_point is None else self.zero_point.float().unsqueeze(-1)
        codes = (grouped / self.scale.float().unsqueeze(-1)).round_().add_(offset)
        codes.clamp_(self.format.lowest, self.format.highest)
        return self.with_codes(codes.reshape(rows, columns).to(torch.int8))

    def with_codes(self, codes: Tensor) -> UniformWeight:
        """These codes [out, in] int8 on this grid."""
        return UniformWeight(
            codes=codes,
            scale=self.scale,
            zero_point=self.zero_point,
            bits=self.format.bits,
            group_size=self.format.group_size,
        )


def nearest(weight: Tensor, format: WeightFormat) -> Tensor:
    """`weight` [out, in] float32 rounded to the grid that covers its whole range, scales in float32."""
    return covering_grid(weight, format, torch.float32).round(weight).dequantize()


def covering_grid(weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> Grid:
    """The grid that spans the whole range of each group; see `ScaleSearch.fit`."""
    groups = weight.unflatten(-1, (-1, format.columns_per_group(weight.shape[-1])))
    return _grid(*_cover(*_range(groups, format), format, scale_dtype), format)


def searched_grid(
    search: MeanSquare, weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, importance: Tensor | None
) -> Grid:
    """The grid with the least error of rounding and clipping; see `ScaleSearch.fit`."""
    *batch, rows, columns = weight.shape
    width = format.columns_per_group(columns)
    groups = weight.reshape(-1, rows, columns).unflatten(-1, (-1, width))
    counts = None
    if search.weighted and importance is not None:
        counts = torch.stack([_counts(own, width) for own in importance.reshape(-1, columns)])
    scale, zero = _search(search, groups, counts, format, scale_dtype)
    return _grid(scale.reshape(*batch, rows, -1, 1), zero.reshape(*batch, rows, -1, 1), format)


def _counts(importance: Tensor, width: int) -> Tensor:
    """How much each column counts, [1, groups, width]. Only ratios matter; a mean of one keeps float32 sums in range whatever
    the units of the input."""
    mean = importance.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (importance / mean).view(1, -1, width)


def _search(
    search: MeanSquare,
    groups: Tensor,
    counts: Tensor | None,
    format: WeightFormat,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scale (stored dtype) and zero point (float32) of `groups` [batch, rows, groups, columns], each [batch, rows, groups, 1].
    counts: how much each column counts, [batch, 1, groups, columns]."""
    low, high = _range(groups, format)
    at_once = max(1, _chunk_elements(groups.device) // groups.numel())

    def place(index: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        factor = 1 - search.shrink * index / (search.candidates - 1)
        scale, zero = _cover(low * factor, high * factor, format, scale_dtype)
        return (scale * sign).to(scale_dtype), zero

    index, sign, least = torch.zeros_like(low), torch.ones_like(low), torch.full_like(low, torch.inf)

    def consider(indices: Tensor, signs: Tensor) -> None:
        """Candidates [tried, batch, rows, groups, 1]; of equal ones the first wins."""
        nonlocal index, sign, least
        for some in zip(indices.split(at_once), signs.split(at_once), strict=True):
            errors = _errors(search.norm, groups, counts, *place(*some), format)
            for index_tried, sign_tried, error in zip(*some, errors, strict=True):
                better = error < least
                index, sign = torch.where(better, index_tried, index), torch.where(better, sign_tried, sign)
                least = torch.where(better, error, least)

    directions = (1, -1) if search.signed and format.symmetric else (1,)
    tried = [(index, sign) for sign in directions for index in range(0, search.candidates, STRIDE)]
    consider(*(low.new_tensor(part).view(-1, 1, 1, 1, 1).expand(-1, *low.shape) for part in zip(*tried, strict=True)))
    offsets = low.new_tensor([offset for near in range(1, STRIDE) for offset in (-near, near)])
    near = (index + offsets.view(-1, 1, 1, 1, 1)).clamp_(0, search.candidates - 1)
    consider(near, sign.expand_as(near))
    return place(index, sign)


def _errors(
    norm: float, groups: Tensor, counts: Tensor | None, scale: Tensor, zero: Tensor, format: WeightFormat
) -> Tensor:
    """What rounding `groups` to these grids costs each group, [tried, batch, rows, groups, 1] as `scale` and `zero`; as many
    rows at a time as `_at_once`."""
    step = scale.float()
    found = torch.empty_like(step)
    rows, weights = _at_once(groups)
    exact, error = (groups.new_empty(len(step) * weights * rows * groups[0, 0].numel()) for _ in range(2))
    for start in range(0, len(groups), weights):
        of = slice(start, start + weights)
        own = None if counts is None else counts[of]
        for first in range(0, groups.shape[1], rows):
            part = (slice(None), of, slice(first, first + rows))
            shape = (len(step), *groups[part[1:]].shape)
            space = exact[: math.prod(shape)].view(shape), error[: math.prod(shape)].view(shape)
            torch.sum(
                _costs(norm, groups[part[1:]], own, step[part], zero[part], format, space),
                -1,
                keepdim=True,
                out=found[part],
            )
    return found.mul_(step.abs().pow(norm))


def _costs(
    norm: float,
    groups: Tensor,
    counts: Tensor | None,
    step: Tensor,
    zero: Tensor,
    format: WeightFormat,
    workspace: tuple[Tensor, Tensor],
) -> Tensor:
    """What rounding each entry costs, in steps, in the workspace: two tensors [tried, *groups]."""
    exact, error = workspace
    torch.div(groups, step, out=exact)
    torch.round(exact, out=error)
    if format.symmetric:
        error.clamp_(format.lowest, format.highest)
    else:
        error.clamp_(format.lowest - zero, format.highest - zero)
    error.sub_(exact)
    error = error.square_() if norm == 2 else error.abs_().pow_(norm)
    return error if counts is None else error.mul_(counts)


def _at_once(groups: Tensor) -> tuple[int, int]:
    """How many rows, of how many weights, of `groups` [batch, rows, groups, columns] are rounded at a time."""
    batch, rows, *_ = groups.shape
    fitting = max(1, _chunk_elements(groups.device) // groups[0, 0].numel())
    return min(fitting, rows), min(max(1, fitting // rows), batch)


def _range(groups: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """What a group's grid must cover, [..., 1] each: from zero or below to zero or above, alike if symmetric."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if format.symmetric:
        bound = torch.maximum(-low, high)
        return -bound, bound
    return low.clamp_max(0), high.clamp_min(0)


def _cover(low: Tensor, high: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The positive scale (stored dtype) and the zero point (float32) whose grid spans `low` .. `high`."""
    span = high - low
    scale = (span / (format.highest - format.lowest)).to(scale_dtype)
    # A range too small for the dtype gets the smallest normal scale; a range of nothing but zeros, any scale: one.
    scale = scale.clamp_min(torch.finfo(scale_dtype).tiny).masked_fill(span == 0, 1)
    if format.symmetric:
        return scale, torch.zeros_like(low)
    zero = (format.lowest - low / scale.float()).round_().clamp_(format.lowest, format.highest)
    return scale, zero


def _grid(scale: Tensor, zero: Tensor, format: WeightFormat) -> Grid:
    """A grid from `_cover`'s tensors [..., out, groups, 1]; ValueError when a scale does not fit its dtype."""
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"weight: a scale exceeds the range of {scale.dtype}, in which it would be stored")
    return Grid(
        format=format, scale=scale.squeeze(-1), zero_point=None if format.symmetric else zero.squeeze(-1).to(torch.int8)
    )


def _chunk_elements(device: torch.device) -> int:
    """Weights that are rounded at a time: what a CPU's caches hold and is large beside the cost of a call, or fills a GPU."""
    return 1 << 17 if device.type == "cpu" else 1 << 26
