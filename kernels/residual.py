"""What quantization left, kept outside the accelerator and fetched channel by channel (DecDEC, Park et al., OSDI 2025).

The residual R [out, in] is stored in few bits, one packed row per *input* channel, so that a channel is one contiguous
read over PCIe. While decoding, each token's k largest |x_i| choose the rows that are added back:

    y = W' x + R[:, I(x)] x[I(x)].

Here is the exact meaning of that, in plain torch and for any number of tokens. The published kernel sorts |x| into buckets,
whose borders need calibration, and leaves to chance which channels of the last bucket are taken; here that is settled in
favour of the lowest channel. Our own kernel finds the largest of each chunk exactly and needs no borders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.forms import CHUNK
from counterweight.kernels.weights.packing import pack, unpack

_BUCKETS = 32
_STORED_BITS = (2, 4, 8)  # widths of which none straddles two words


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualStore:
    """A quantized residual [out, in] by input channel, and what its channels are chosen with.

    packed: [in, ceil(out * bits / 32)] int32; with 4 bits, word c of row i holds outputs 8c .. 8c+7 of input channel i,
    output 8c+j as code + 8 in bits 4j .. 4j+3. Codes are symmetric, -(2**(bits-1) - 1) .. 2**(bits-1) - 1; bits beyond
    the last output are zero. scale: [out], any float dtype. thresholds: [in] float32, descending: the largest 1st, 2nd,
    .. |x_i| of a token that calibration saw. bits: 2, 4 or 8.
    """

    packed: Tensor
    scale: Tensor
    thresholds: Tensor
    out_features: int
    bits: int = 4

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, thresholds: Tensor, *, bits: int = 4) -> ResidualStore:
        """Packs codes [out, in] int8; ValueError for shapes that disagree, for other bits and for a code out of range."""
        if bits not in _STORED_BITS:
            raise ValueError(f"bits: {bits}: expected 2, 4 or 8")
        packed = pack(codes.T.contiguous(), bits)
        rows, columns = codes.shape
        _expect(scale, "scale", (rows,))
        _expect(thresholds, "thresholds", (columns,))
        lowest = 1 - (1 << (bits - 1))
        if bool((codes < lowest).any()):
            raise ValueError(f"codes: smallest {int(codes.min())}: expected {lowest} or more, the grid is symmetric")
        return cls(packed=packed, scale=scale, thresholds=thresholds.float(), out_features=rows, bits=bits)

    @property
    def in_features(self) -> int:
        return int(self.packed.shape[0])

    @property
    def bits_stored(self) -> int:
        """Storage of all three tensors, padding included."""
        return sum(8 * tensor.nbytes for tensor in (self.packed, self.scale, self.thresholds))

    def rows(self, channels: Tensor) -> Tensor:
        """The rows [k, out] float32 of the input channels [k] int64."""
        codes = unpack(self.packed[channels], self.bits, self.out_features)
        return codes.float() * self.scale.float()

    def dense(self) -> Tensor:
        """The residual as the store knows it, [out, in] float32."""
        codes = unpack(self.packed, self.bits, self.out_features)
        return codes.T.float() * self.scale.float().unsqueeze(1)

    def to(self, device: torch.device) -> ResidualStore:
        """The same store on another device."""
        return ResidualStore(
            packed=self.packed.to(device),
            scale=self.scale.to(device),
            thresholds=self.thresholds.to(device),
            out_features=self.out_features,
            bits=self.bits,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A store and the rule that chooses a token's channels: the largest of every 1024 (chunked), nearly the largest of them, by
    buckets as DecDEC's kernel (bucketed), the largest of all (exact), or always those of the largest `importance` [in]
    (static); channels_per_chunk of every 1024 channels."""

    store: ResidualStore
    selection: Literal["chunked", "bucketed", "exact", "static"] = "chunked"
    channels_per_chunk: int
    importance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.selection == "static" and self.importance is None:
            raise ValueError("importance: none: a static selection needs E[x^2] of the layer's input")

    @property
    def channels(self) -> int:
        """How many channels of a token are corrected."""
        return channels_of(self.channels_per_chunk, self.store.in_features)

    @property
    def bits_stored(self) -> int:
        """Storage of the store, and of the importance that a static selection goes by."""
        static = self.importance if self.selection == "static" else None
        return self.store.bits_stored + (0 if static is None else 8 * static.nbytes)

    def select(self, x: Tensor) -> Tensor:
        """The channels of each token of x [..., in] that are corrected: bool, [..., in], or [in] when static."""
        if self.selection == "chunked":
            return select_chunked(x, self.channels_per_chunk)
        if self.selection == "bucketed":
            return select_bucketed(x, self.channels_per_chunk, self.store.thresholds)
        if self.importance is not None and self.selection == "static":
            return select_static(self.importance, self.channels)
        return select_exact(x, self.channels)

    def apply(self, x: Tensor, *, decoded: Tensor | None = None) -> Tensor:
        """What is added to a layer's output for x [..., in]: [..., out] float32.

        decoded: bool [...], the tokens that are corrected: those that are generated one by one. None corrects all of
        them, as the paper does for perplexity.
        """
        selected = self.select(x)
        if decoded is not None:
            selected = selected & decoded.unsqueeze(-1)
        return compensate(x, self.store, selected)

    def to(self, device: torch.device) -> Correction:
        """The same correction on another device."""
        importance = None if self.importance is None else self.importance.to(device)
        return replace(self, store=self.store.to(device), importance=importance)


def compensate(x: Tensor, store: ResidualStore, selected: Tensor) -> Tensor:
    """What is added to the output: R[:, I(x)] x[I(x)], [..., out] float32, summed in float32.

    x: [..., in] of any float dtype. selected: bool, [..., in] or [in] for all tokens alike. Of a single token only the rows
    that it selects are unpacked.
    """
    if x.numel() == x.shape[-1]:
        token = x.reshape(-1).float()
        channels = selected.reshape(-1).nonzero().squeeze(1)
        return (token[channels] @ store.rows(channels)).reshape(*x.shape[:-1], store.out_features)
    return functional.linear(torch.where(selected, x.float(), 0.0), store.dense())


def channels_of(k_chunk: int, columns: int) -> int:
    """How many of `columns` input channels are corrected at `k_chunk` > 0 of every 1024: at least one."""
    return max(1, k_chunk * columns // CHUNK)


def select_exact(x: Tensor, k: int) -> Tensor:
    """The k largest |x_i| of each token, the lowest channels among equals: bool, as x [..., in].

    ValueError for k outside 0 .. in and for an x that is not finite.
    """
    magnitude = _magnitude(x)
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"k: {k}: expected 0 .. {x.shape[-1]}, the input channels")
    order = magnitude.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def select_static(importance: Tensor, k: int) -> Tensor:
    """The same k channels for every token, those of largest importance [in] (such as E[x^2]): bool [in].

    What dynamic selection is measured against. Raises as `select_exact`.
    """
    return select_exact(importance, k)


def select_chunked(x: Tensor, k_chunk: int) -> Tensor:
    """In each chunk of 1024 channels the `k_chunk` largest |x_i|, the lowest channels among equals: bool, as x [..., in].

    A last chunk of another length gets its share, rounded down; an input of less than one chunk at least one channel.
    ValueError for k_chunk outside 1 .. 1024 and for an x that is not finite.
    """
    if not 1 <= k_chunk <= CHUNK:
        raise ValueError(f"k_chunk: {k_chunk}: expected 1 .. {CHUNK}")
    chunks = x.split(CHUNK, dim=-1)
    shares = [k_chunk] * len(chunks)
    shares[-1] = channels_of(k_chunk, x.shape[-1]) - sum(shares[:-1])
    return torch.cat([select_exact(chunk, share) for chunk, share in zip(chunks, shares, strict=True)], dim=-1)


def select_bucketed(x: Tensor, k_chunk: int, thresholds: Tensor) -> Tensor:
    """DecDEC's approximate choice: in each chunk of 1024 channels `k_chunk` of the largest, in buckets of |x|.

    A last chunk of another length gets its share, rounded down; an input of less than one chunk at least one channel
    (k_chunk = 0 selects nothing). Channels are taken bucket by bucket, from the largest, by channel number within a
    bucket. x: [..., in]; thresholds: [in] float32 as in `ResidualStore`; returns bool, as x. ValueError for k_chunk
    outside 0 .. 1024, for thresholds of another shape and for an x that is not finite.
    """
    columns = x.shape[-1]
    magnitude = _magnitude(x)
    _expect(thresholds, "thresholds", (columns,))
    if not 0 <= k_chunk <= CHUNK:
        raise ValueError(f"k_chunk: {k_chunk}: expected 0 .. {CHUNK}")
    if k_chunk == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    k = channels_of(k_chunk, columns)
    floors = bucket_floors(thresholds, k)
    # Of all floors in ascending order, those at or below |x| are those of its own bucket and of the buckets after it.
    buckets = _BUCKETS - torch.bucketize(magnitude, floors.flip(0), right=True, out_int32=True)
    width = min(CHUNK, columns)
    chunks = -(-columns // width)
    # Beyond the last channel lies a bucket after all others.
    buckets = functional.pad(buckets, (0, chunks * width - columns), value=_BUCKETS).to(torch.uint8)
    order = buckets.unflatten(-1, (chunks, width)).argsort(dim=-1, stable=True)
    share = torch.full((chunks, 1), k_chunk, device=x.device)
    share[-1] = k - k_chunk * (chunks - 1)
    taken = torch.arange(width, device=x.device) < share  # [chunks, width], by place in the order
    selected = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))
    return selected.flatten(-2)[..., :columns]


def bucket_floors(thresholds: Tensor, k: int) -> Tensor:
    """The smallest |x| of each of the 32 buckets, [32] float32, descending to 0; bucket 0 has no upper end.

    16 buckets are evenly spaced from the largest |x_i| that calibration saw down to its largest k-th largest, thresholds
    [k-1]; below, 16 more down to zero. To be handed to the kernel: rounded here once, floors cannot cross.
    """
    first, last = thresholds[[0, k - 1]].double()
    steps = torch.arange(16, dtype=torch.float64, device=thresholds.device)
    upper = (first * (15 - steps) + last * steps) / 15
    return torch.cat([upper, last * (15 - steps) / 16]).float()


def _magnitude(x: Tensor) -> Tensor:
    """|x| in float32; ValueError when it is not finite, because the kernel has no bucket for that."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: holds NaN or infinity: expected finite activations")
    return x.float().abs()


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {list(tensor.shape)}: expected {list(shape)}")
