"""Second moments of a layer's input, mergeable by addition, independent of who gathered them.

Up to three streams describe the same tokens at the same place:

    x   what enters the layer, unquantized: the low-rank branch sees it
    y   Q(x), what the integer weight sees; x itself when the recipe is weight-only
    t   what enters the layer in the original model; x itself unless blocks are fed by compressed ones

A statistic is gathered once per *distinct* input (q, k and v share one; gate and up share one). Tokens arrive in fixed
shards; products are taken in float32 within a shard and summed over shards in float64 in shard order, so the result has
the same bits however many workers or threads took part. A symmetric product is held by its lower triangle until somebody
solves with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterweight.kernels.backend import runs_kernels
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.thresholds import Thresholds
from counterweight.workers.calibration.triangle import TRIANGLE_BLOCK, LowerTriangle
from counterweight.workers.parallel import PIECE_TOKENS, Share, in_turn

if TYPE_CHECKING:
    from counterweight.workers.calibration.experts import Starvation


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """What is to be gathered beside the number of tokens. products: the second moments of x, and of what else there is.
    activations: how y is made of x; None: y is not needed. absolute: sum |x| too; thresholds: the `Thresholds` of x too."""

    activations: ActivationFormat | None = None
    absolute: bool = False
    thresholds: bool = False
    products: bool = True

    @property
    def anything(self) -> bool:
        """Whether tokens are looked at, and not only counted."""
        return self.products or self.absolute or self.thresholds


NOTHING_ELSE = Gathering()


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Moments of what enters a layer: sums over tokens, [in, in] float64; `xy` is sum x y^T.

    gram: xx; None where no products were gathered. tokens: number of rows summed. others: the products of further streams,
    where they were gathered.
    absolute: sum |x|, [in] float64, where it was gathered; thresholds likewise, [in] float32. activations: how y was made of x.
    drawn: of an expert's, how many of the tokens are of drawn sequences; None where none were drawn.
    starvation: of an expert's, that its own tokens were too few, and what was added to them, which `tokens` counts.
    """

    gram: Tensor | None
    tokens: int
    others: Mapping[str, Tensor] = field(default_factory=dict)
    absolute: Tensor | None = None
    thresholds: Tensor | None = None
    activations: ActivationFormat | None = None
    drawn: int | None = None
    starvation: Starvation | None = None

    @property
    def gathering(self) -> Gathering:
        """What was gathered, to be gathered again of another input."""
        return Gathering(
            activations=self.activations,
            absolute=self.absolute is not None,
            thresholds=self.thresholds is not None,
            products=self.gram is not None,
        )

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        found = (self.gram, *self.others.values(), self.absolute, self.thresholds)
        return sum(tensor.nbytes for tensor in found if tensor is not None)

    @property
    def width(self) -> int:
        """Channels of the input; ValueError where no products were gathered."""
        return int(self.product("xx").shape[0])

    def product(self, streams: str) -> Tensor:
        """The sum of outer products of two streams, such as `xy`. A stream that was not gathered is x itself. ValueError where
        no products were gathered."""
        if self.gram is None:
            raise ValueError(f"statistics: no product {streams}: expected those of a recipe that needs them")
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
        accumulator.add_rows(rows)
        return accumulator.result()

    def mean_gram(self) -> Tensor:
        """E[x x^T], [in, in] float64; zeros when no token was seen."""
        return self.product("xx") / max(self.tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMoments:
    """`InputStatistics` in about half of their memory. width: channels of the input. triangles: products of a stream with
    itself, none where no products were gathered; crossed: of two streams, [in, in] float64."""

    width: int
    triangles: Mapping[str, LowerTriangle]
    crossed: Mapping[str, Tensor]
    tokens: int
    absolute: Tensor | None
    thresholds: Tensor | None
    activations: ActivationFormat | None
    drawn: int | None = None
    starvation: Starvation | None = None

    @classmethod
    def of(cls, statistics: InputStatistics) -> PackedMoments:
        """What `unpacked` gives back; of statistics with products."""
        products = {"xx": statistics.product("xx"), **statistics.others}
        return cls(
            width=statistics.width,
            triangles={name: LowerTriangle.of(one) for name, one in products.items() if name[0] == name[1]},
            crossed={name: one for name, one in products.items() if name[0] != name[1]},
            tokens=statistics.tokens,
            absolute=statistics.absolute,
            thresholds=statistics.thresholds,
            activations=statistics.activations,
            drawn=statistics.drawn,
            starvation=statistics.starvation,
        )

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        found = (*self.triangles.values(), *self.crossed.values(), self.absolute, self.thresholds)
        return sum(each.nbytes for each in found if each is not None)

    def unpacked(self) -> InputStatistics:
        """With squares of their own."""
        squares = {name: triangle.square() for name, triangle in self.triangles.items()}
        return InputStatistics(
            gram=squares.pop("xx", None),
            tokens=self.tokens,
            others={**squares, **self.crossed},
            absolute=self.absolute,
            thresholds=self.thresholds,
            activations=self.activations,
            drawn=self.drawn,
            starvation=self.starvation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMoments:
    """One shard's contribution, float32: its products of a stream with itself, and those of two streams [in, in]."""

    width: int
    triangles: Mapping[str, LowerTriangle]
    crossed: Mapping[str, Tensor]
    tokens: int
    absolute: Tensor | None
    thresholds: Tensor | None

    @classmethod
    def of(
        cls,
        rows: Tensor,
        gathering: Gathering = NOTHING_ELSE,
        original: Tensor | None = None,
        share: Share[None] = in_turn,
    ) -> ShardMoments:
        """Moments of the rows x [..., in] of one shard; original: the rows t of the same tokens. share: does the products."""
        x = rows.reshape(-1, rows.shape[-1])
        streams = _streams(x, gathering, original, partial(_quantized, share=share))

        @cache
        def wide(name: str) -> Tensor:
            return (x if name == "x" else streams[name]).float()

        square = (x.shape[1], x.shape[1])
        pairs = [name * 2 for name in streams]
        triangles = {pair: LowerTriangle.empty(x.shape[1], torch.float32, x.device) for pair in pairs}
        crossed: dict[str, Tensor] = {}
        products: list[Callable[[], None]] = []  # the largest first, so that threads end together
        for one, other in combinations(streams, 2):
            crossed[one + other] = torch.empty(square, device=x.device)
            products.append(partial(_multiply, wide(one), wide(other), crossed[one + other]))
        for name in streams:
            strips = reversed(list(triangles[name * 2].strips()))
            products += [partial(_multiply, wide(name)[:, a:b], wide(name)[:, :b], strip) for a, b, strip in strips]
        share(products)
        return cls(
            width=int(x.shape[1]),
            triangles=triangles,
            crossed=crossed,
            tokens=len(x),
            absolute=wide("x").abs().sum(0) if gathering.absolute else None,
            thresholds=Thresholds.of(wide("x")) if gathering.thresholds else None,
        )


class Accumulator:
    """Sums shards in the order in which they are added, in float64, holding one sum."""

    def __init__(self, width: int, device: torch.device | str = "cpu", gathering: Gathering = NOTHING_ELSE) -> None:
        self.width, self._device, self._gathering = width, device, gathering
        self._triangles: dict[str, LowerTriangle] = {}
        if gathering.products:
            self._triangles["xx"] = LowerTriangle.zeros(width, torch.float64, device)
        self._crossed: dict[str, Tensor] = {}
        self._absolute: Tensor | None = None
        self._thresholds = Thresholds(width, device) if gathering.thresholds else None
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Rows that were summed so far."""
        return self._tokens

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        found = (*self._triangles.values(), *self._crossed.values(), self._absolute)
        return sum(each.nbytes for each in found if each is not None)

    def add(self, shard: ShardMoments) -> None:
        """Adds one shard; ValueError when its width is another."""
        if shard.width != self.width:
            raise ValueError(f"a shard of width {shard.width} cannot join statistics of width {self.width}")
        for name, triangle in shard.triangles.items():
            self._triangle(name).add_(triangle)
        for name, product in shard.crossed.items():
            if name in self._crossed:
                # Strip by strip: torch would make a float64 copy of the whole product first.
                for total, part in zip(
                    self._crossed[name].split(TRIANGLE_BLOCK), product.split(TRIANGLE_BLOCK), strict=True
                ):
                    total += part
            else:
                self._crossed[name] = product.double()
        self._add_vectors(shard.tokens, shard.absolute, shard.thresholds)

    def add_rows(self, rows: Tensor, original: Tensor | None = None) -> None:
        """Adds the shard whose rows x [..., in] these are; original: the rows t of the same tokens. Where kernels run products
        are added as they are made, with the same bits; elsewhere it is `add` of the shard's moments."""
        if not runs_kernels(rows.device):
            self.add(ShardMoments.of(rows, self._gathering, original))
            return
        from counterweight.kernels.gpu.gram import add_gram_, add_product_

        x = rows.reshape(-1, rows.shape[-1])
        streams = _streams(x, self._gathering, original, fake_quantize_activations)
        for name, stream in streams.items():
            add_gram_(self._triangle(name * 2).entries, stream)
        for one, other in combinations(streams, 2):
            add_product_(self._cross(one + other), streams[one], streams[other])
        self._add_vectors(
            len(x),
            x.float().abs().sum(0) if self._gathering.absolute else None,
            Thresholds.of(x.float()) if self._gathering.thresholds else None,
        )

    def count(self, tokens: int) -> None:
        """So many rows were added by `add_groups`."""
        self._tokens += tokens

    def _cross(self, name: str) -> Tensor:
        if name not in self._crossed:
            self._crossed[name] = torch.zeros(self.width, self.width, dtype=torch.float64, device=self._device)
        return self._crossed[name]

    def _triangle(self, name: str) -> LowerTriangle:
        if name not in self._triangles:
            self._triangles[name] = LowerTriangle.zeros(self.width, torch.float64, self._device)
        return self._triangles[name]

    def _add_vectors(self, tokens: int, absolute: Tensor | None, thresholds: Tensor | None) -> None:
        if absolute is not None:
            self._absolute = absolute.double() if self._absolute is None else self._absolute + absolute.double()
        if thresholds is not None and self._thresholds is not None:
            self._thresholds.merge(thresholds)
        self._tokens += tokens

    def packed(self) -> PackedMoments:
        """The sum so far, in memory that further shards are added to; zeros when nothing was added."""
        return PackedMoments(
            width=self.width,
            triangles=self._triangles,
            crossed=self._crossed,
            tokens=self._tokens,
            absolute=self._absolute,
            thresholds=None if self._thresholds is None else self._thresholds.result(),
            activations=self._gathering.activations,
        )

    def result(self) -> InputStatistics:
        """The sum so far, unpacked."""
        return self.packed().unpacked()


def add_groups(accumulators: Sequence[Accumulator | None], rows: Tensor, bounds: Tensor) -> None:
    """`Accumulator.add_rows` of each, where kernels run, in one launch a product: of the rows [rows, in] from bounds[i] to
    bounds[i + 1]; int64, on the device, so that who knows their number calls `Accumulator.count`. None: nothing is added. All
    gather the same, and nothing but products."""
    from counterweight.kernels.gpu.gram import add_grams_, add_products_
    from counterweight.kernels.gpu.grouped import Places

    gathering = next(one._gathering for one in accumulators if one is not None)

    def places(totals: list[Tensor | None]) -> Places:
        found = Places.of(totals)
        if found is None:
            raise ValueError("statistics: of different widths or devices: expected those of experts of one layer")
        return found

    streams = _streams(rows, gathering, None, fake_quantize_activations)
    for name, stream in streams.items():
        triangles = [None if one is None else one._triangle(name * 2).entries for one in accumulators]
        add_grams_(places(triangles), stream, bounds)
    for one, other in combinations(streams, 2):
        squares = [None if each is None else each._cross(one + other) for each in accumulators]
        add_products_(places(squares), streams[one], streams[other], bounds)


def _streams(
    x: Tensor, gathering: Gathering, original: Tensor | None, quantize: Callable[[Tensor, ActivationFormat], Tensor]
) -> dict[str, Tensor]:
    """x [tokens, in], and what else is multiplied of the same tokens, in the dtype of the forward pass; none where no
    products are gathered."""
    if not gathering.products:
        return {}
    streams = {"x": x}
    if gathering.activations is not None:
        # In the dtype of the forward pass, as the layer itself will do it.
        streams["y"] = quantize(x, gathering.activations)
    if original is not None:
        streams["t"] = original.reshape(x.shape)
    return streams


def _quantized(x: Tensor, form: ActivationFormat, share: Share[None]) -> Tensor:
    """Activations [tokens, in] as codes see them; of each token by itself."""
    found = torch.empty_like(x)

    def quantize(rows: Tensor, out: Tensor) -> None:
        out.copy_(fake_quantize_activations(rows, form))

    pieces = zip(x.split(PIECE_TOKENS), found.split(PIECE_TOKENS), strict=True)
    share([partial(quantize, rows, out) for rows, out in pieces])
    return found


def _multiply(one: Tensor, other: Tensor, out: Tensor) -> None:
    """The sum of outer products of the rows of two float32 streams; of a stream with itself strip by strip of the lower
    triangle, which is half of the products."""
    torch.mm(one.T, other, out=out)
