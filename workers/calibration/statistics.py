"""Second moments of a layer's input, mergeable by addition, independent of who gathered them.

Up to three streams describe the same tokens at the same place:

    x   what enters the layer, unquantized: the low-rank branch sees it
    y   Q(x), what the integer weight sees; x itself when the recipe is weight-only
    t   what enters the layer in the original model; x itself unless blocks are fed by compressed ones

A statistic is gathered once per *distinct* input (q, k and v share one; gate and up share one). Tokens arrive in fixed
shards; products are taken in float32 within a shard and summed over shards in float64 in shard order, so the result has
the same bits however many workers or threads took part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from counterweight.kernels.backend import runs_kernels
from counterweight.kernels.formats import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.thresholds import Thresholds

TRIANGLE_BLOCK = 128
"""Columns per strip of the lower triangle. One Zen 4 core, float32, 4096 x 768: the full product takes 74 ms, strips of
64, 128, 192, 256 and 384 columns take 52, 32, 44, 35 and 54 ms (`benchmarks/gram.py`)."""

SYMMETRIC = frozenset({"xx", "yy", "tt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """What is to be gathered beside xx. activations: how y is made of x; None: y is not needed. absolute: sum |x| too;
    thresholds: the `Thresholds` of x too."""

    activations: ActivationFormat | None = None
    absolute: bool = False
    thresholds: bool = False


NOTHING_ELSE = Gathering()


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Moments of what enters a layer: sums over tokens, [in, in] float64; `xy` is sum x y^T.

    gram: xx. tokens: number of rows summed. others: the products of further streams, where they were gathered.
    absolute: sum |x|, [in] float64, where it was gathered; thresholds likewise, [in] float32. activations: how y was made of x.
    """

    gram: Tensor
    tokens: int
    others: Mapping[str, Tensor] = field(default_factory=dict)
    absolute: Tensor | None = None
    thresholds: Tensor | None = None
    activations: ActivationFormat | None = None

    @property
    def gathering(self) -> Gathering:
        """What was gathered, to be gathered again of another input."""
        return Gathering(
            activations=self.activations,
            absolute=self.absolute is not None,
            thresholds=self.thresholds is not None,
        )

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        found = (self.gram, *self.others.values(), self.absolute, self.thresholds)
        return sum(tensor.nbytes for tensor in found if tensor is not None)

    @property
    def width(self) -> int:
        return int(self.gram.shape[0])

    def product(self, streams: str) -> Tensor:
        """The sum of outer products of two streams, such as `xy`. A stream that was not gathered is x itself."""
        present = "".join("x" if stream not in self.streams else stream for stream in streams)
        if present == "xx":
            return self.gram
        return self.others[present] if present in self.others else self.others[present[::-1]].T

    @property
    def streams(self) -> frozenset[str]:
        """The streams that were gathered, `x` among them."""
        return frozenset("x").union(*self.others)

    @classmethod
    def of(cls, rows: Tensor, gathering: Gathering = NOTHING_ELSE) -> InputStatistics:
        """Statistics of the rows [..., in] of one shard."""
        accumulator = Accumulator(rows.shape[-1], rows.device, gathering)
        accumulator.add(ShardMoments.of(rows, gathering))
        return accumulator.result()

    def mean_gram(self) -> Tensor:
        """E[x x^T], [in, in] float64; zeros when no token was seen."""
        return self.gram / max(self.tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMoments:
    """One shard's contribution, float32: of xx, yy and tt [in, in] only the lower triangle holds meaning."""

    products: Mapping[str, Tensor]
    tokens: int
    absolute: Tensor | None
    thresholds: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, gathering: Gathering = NOTHING_ELSE, original: Tensor | None = None) -> ShardMoments:
        """Moments of the rows x [..., in] of one shard; original: the rows t of the same tokens."""
        x = rows.reshape(-1, rows.shape[-1])
        streams = {"x": x}
        if gathering.activations is not None:
            # In the dtype of the forward pass, as the layer itself will do it.
            streams["y"] = fake_quantize_activations(rows, gathering.activations).reshape(x.shape)
        if original is not None:
            streams["t"] = original.reshape(x.shape)

        @cache
        def wide(name: str) -> Tensor:
            return streams[name].float()

        # The kernel takes a stream in its own dtype, so that often no float32 copy is needed at all.
        kernel = runs_kernels(x.device)
        names = list(streams)
        products = {
            one + other: _lower(streams[one] if kernel else wide(one)) if one == other else wide(one).T @ wide(other)
            for place, one in enumerate(names)
            for other in names[place:]
        }
        return cls(
            products=products,
            tokens=int(x.shape[0]),
            absolute=wide("x").abs().sum(0) if gathering.absolute else None,
            thresholds=Thresholds.of(wide("x")) if gathering.thresholds else None,
        )


class Accumulator:
    """Sums shards in the order in which they are added, in float64, holding one sum."""

    def __init__(self, width: int, device: torch.device | str = "cpu", gathering: Gathering = NOTHING_ELSE) -> None:
        self._width, self._activations = width, gathering.activations
        self._products = {"xx": torch.zeros(width, width, dtype=torch.float64, device=device)}
        self._absolute: Tensor | None = None
        self._thresholds = Thresholds(width, device) if gathering.thresholds else None
        self._tokens = 0

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        found = (*self._products.values(), self._absolute)
        return sum(tensor.nbytes for tensor in found if tensor is not None)

    def add(self, shard: ShardMoments) -> None:
        """Adds one shard; ValueError when its width is another."""
        if shard.products["xx"].shape != self._products["xx"].shape:
            raise ValueError(
                f"a shard of width {len(shard.products['xx'])} cannot join statistics of width {self._width}"
            )
        for name, product in shard.products.items():
            if name in self._products:
                # Strip by strip: torch would make a float64 copy of the whole product first.
                for total, part in zip(
                    self._products[name].split(TRIANGLE_BLOCK), product.split(TRIANGLE_BLOCK), strict=True
                ):
                    total += part
            else:
                self._products[name] = product.double()
        if shard.absolute is not None:
            absolute = shard.absolute.double()
            self._absolute = absolute if self._absolute is None else self._absolute + absolute
        if shard.thresholds is not None and self._thresholds is not None:
            self._thresholds.merge(shard.thresholds)
        self._tokens += shard.tokens

    def result(self) -> InputStatistics:
        """The sum so far; zeros when nothing was added."""
        whole = {name: _whole(sum_) if name in SYMMETRIC else sum_ for name, sum_ in self._products.items()}
        gram = whole.pop("xx")
        return InputStatistics(
            gram=gram,
            tokens=self._tokens,
            others=whole,
            absolute=self._absolute,
            thresholds=None if self._thresholds is None else self._thresholds.result(),
            activations=self._activations,
        )


def _lower(x: Tensor) -> Tensor:
    """The lower triangle of x^T x in float32, strip by strip: half of the products, because the matrix is symmetric.
    x: float32, for the kernel any float."""
    width = x.shape[1]
    lower = torch.zeros(width, width, device=x.device)
    if runs_kernels(x.device):
        from counterweight.kernels.gpu.gram import add_gram_

        return add_gram_(lower, x.contiguous())
    for start in range(0, width, TRIANGLE_BLOCK):
        stop = min(start + TRIANGLE_BLOCK, width)
        torch.mm(x[:, start:stop].T, x[:, :stop], out=lower[start:stop, :stop])
    return lower


def _whole(lower: Tensor) -> Tensor:
    """The symmetric matrix of this lower triangle, strip by strip, without a second copy."""
    whole = lower.tril()
    for start in range(0, len(whole), TRIANGLE_BLOCK):
        stop = min(start + TRIANGLE_BLOCK, len(whole))
        whole[start:stop, stop:] = whole[stop:, start:stop].T
        whole[start:stop, start:stop] += whole[start:stop, start:stop].tril(-1).T
    return whole
