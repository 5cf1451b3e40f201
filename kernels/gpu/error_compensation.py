"""Adds back what quantization left of the channels that matter to a token (DecDEC, Park et al., OSDI 2025).

The residual lies in host memory and is read in place, over PCIe, by the rows that a token needs. Two kernels: the first
chooses each token's channels, the second fetches their rows, each program for columns of its own. So no two programs add to
one output, the sums have one order, and channels that were chosen otherwise enter at the second.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Bodies of kernels have no types that Python knows; the functions that launch them do.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.forms import CHUNK
from counterweight.kernels.gpu import launch
from counterweight.kernels.residual import ResidualStore

MOST_PER_CHUNK = 128
"""Of 1024 channels. More than some 17 cannot hide behind the layer's own 4-bit weights: a bus of 50 GB/s beside a memory of
4.3 TB/s (an estimate, for an H200)."""

_PROGRAMS = 16
"""That fetch for one token. vLLM found a dozen enough for PCIe 5 (its pull request 42212); more would take processors from
the layer that runs beside them."""

_WORDS_IN_FLIGHT = {2: 1024, 4: 2048, 8: 2048}
"""Of one program, by bits. 16 programs with 4 to 8 KB cover a round trip over PCIe; twice as much, unpacked, spills."""

FETCHING_WARPS = 8  # with 4 the same tile spills on an sm_100


def compensate_(y: Tensor, x: Tensor, residual: ResidualStore, channels_per_chunk: int) -> Tensor:
    """y += R[:, I(x)] x[I(x)] with I(x) as `kernels.residual.select_chunked` has it; returns y.

    y: [tokens, out] or [out] float32. x: [tokens, in] or [in], float16, bfloat16 or float32. residual: packed on x's device
    or in pinned host memory, scale on x's device. channels_per_chunk: 1 .. 128 of every 1024. Summed in float32, always in
    the same order. Infinity and NaN in x count as the largest and show in y. ValueError for anything else.
    """
    return add_rows_(y, x, residual, select_channels(x, channels_per_chunk))


def select_channels(x: Tensor, channels_per_chunk: int) -> Tensor:
    """The channels of `kernels.residual.select_chunked`, chunk by chunk, the largest |x| first: [tokens, chosen] int32.

    x: [tokens, in] or [in] as in `compensate_`; [in] counts as one token.
    """
    x = _rows("x", x)
    if (reason := _unsupported_input(x)) is not None:
        raise ValueError(reason)
    if not 1 <= channels_per_chunk <= MOST_PER_CHUNK:
        raise ValueError(f"channels_per_chunk: {channels_per_chunk}: expected 1 .. {MOST_PER_CHUNK}")
    tokens, columns = x.shape
    chosen = max(1, channels_per_chunk * columns // CHUNK)
    channels = torch.empty(tokens, chosen, dtype=torch.int32, device=x.device)
    with launch.current(x.device):
        select_kernel[(triton.cdiv(columns, CHUNK), tokens)](
            x,
            channels,
            x.stride(0),
            columns,
            channels_per_chunk,
            chosen,
            CHUNK=CHUNK,
            LARGEST=triton.next_power_of_2(channels_per_chunk),
            EXACT_KEYS=x.dtype is torch.float32,
            num_warps=4,
        )
    return channels


def add_rows_(y: Tensor, x: Tensor, residual: ResidualStore, channels: Tensor, *, accumulate: bool = True) -> Tensor:
    """y += R[:, channels] x[channels] for each token; with accumulate off y is overwritten. Returns y.

    channels: [tokens, chosen], or [chosen] for all tokens alike, int32 or int64, each within 0 .. in - 1: nothing checks
    that, a kernel cannot raise. Everything else as in `compensate_`. Overwriting is for a layer that runs at the same time:
    give it a y of its own, to be added like one more partial sum.
    """
    if (reason := unsupported(x, residual)) is not None:
        raise ValueError(reason)
    result, x, y = y, _rows("x", x), _rows("y", y)
    tokens, columns = x.shape
    if columns != residual.in_features:
        raise ValueError(f"x: {columns} channels: expected {residual.in_features}, the residual's")
    if y.dtype is not torch.float32 or y.shape != (tokens, residual.out_features) or y.device != x.device:
        raise ValueError(
            f"y: {list(y.shape)} {y.dtype} on {y.device}: expected {[tokens, residual.out_features]} float32 on {x.device}"
        )
    if channels.shape[:-1] not in ((), (tokens,)) or channels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"channels: {list(channels.shape)} {channels.dtype}: expected [{tokens}, chosen] or [chosen] int"
        )
    channels = channels.contiguous()
    chosen, words = channels.shape[-1], residual.packed.shape[1]
    rows_block, words_block = blocks(chosen, words, residual.bits)
    with launch.current(x.device):
        add_rows_kernel[(min(_PROGRAMS, triton.cdiv(words, words_block)), tokens)](
            y,
            x,
            channels,
            residual.packed,
            residual.scale,
            y.stride(0),
            x.stride(0),
            chosen if channels.ndim == 2 else 0,
            chosen,
            words,
            residual.out_features,
            BITS=residual.bits,
            ROWS=rows_block,
            WORDS=words_block,
            ACCUMULATE=accumulate,
            num_warps=FETCHING_WARPS,
        )
    return result


def unsupported(x: Tensor, residual: ResidualStore) -> str | None:
    """Why these cannot be handed to the kernels, or None."""
    if (reason := _unsupported_input(x)) is not None:
        return reason
    if residual.packed.device != x.device and not residual.packed.is_pinned():
        return f"residual: on {residual.packed.device}, not pinned: expected {x.device} or pinned host memory"
    if residual.scale.device != x.device:
        return f"residual: scale on {residual.scale.device}: expected {x.device}"
    if not residual.packed.is_contiguous():
        return f"residual: strides {residual.packed.stride()}: expected contiguous rows"
    return None


def _unsupported_input(x: Tensor) -> str | None:
    if not launch.runs_on(x.device):
        return f"x: on {x.device}: no kernel runs there in this process"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x: {x.dtype}: expected float16, bfloat16 or float32"
    return None


def _rows(name: str, tensor: Tensor) -> Tensor:
    """[tokens, width] of [tokens, width] or [width]; ValueError for another number of dimensions and for strided rows."""
    if tensor.ndim not in (1, 2) or tensor.stride(-1) != 1:
        found = f"{list(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"{name}: {found}: expected [tokens, width] or [width], rows contiguous")
    return tensor if tensor.ndim == 2 else tensor.unsqueeze(0)


def blocks(chosen: int, words: int, bits: int) -> tuple[int, int]:
    """Rows, and words of a row, that a program has in flight.

    32 words, for PCIe serves 128 bytes at a time; 64 where that leaves all programs work.
    """
    words_block = 32 if words < 64 * _PROGRAMS else 64
    rows_block = min(_WORDS_IN_FLIGHT[bits] // words_block, max(16, triton.next_power_of_2(chosen)))
    return rows_block, words_block


@triton.jit
def select_kernel(
    x,
    channels,
    x_stride,
    in_features,
    per_chunk,
    chosen,
    CHUNK: tl.constexpr,
    LARGEST: tl.constexpr,
    EXACT_KEYS: tl.constexpr,
):
    """grid (chunks, tokens). A key is |x| above the channel's distance from the chunk's end: unique, so any sort of them is
    the sort, and the lowest channel wins among equals. Below a 16-bit float's digits ten bits are free; a float32 needs
    more than 32 bits."""
    chunk = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, CHUNK)
    # What is beyond the last channel counts as zeros behind it: any channel goes before them.
    inside = chunk * CHUNK + place < in_features
    values = tl.load(x + token * x_stride + chunk * CHUNK + place, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(values).to(tl.uint32, bitcast=True)
    from_end = (CHUNK - 1 - place).to(tl.uint32)
    sorting_part = magnitude.to(tl.uint64) if EXACT_KEYS else magnitude // CHUNK
    keys = sorting_part * CHUNK + from_end
    largest = tl.topk(keys, LARGEST)
    channel = chunk * CHUNK + (CHUNK - 1) - (largest & (CHUNK - 1)).to(tl.int32)
    rank = tl.arange(0, LARGEST)
    to = chunk * per_chunk + rank
    tl.store(channels + token * chosen + to, channel, mask=(rank < per_chunk) & (to < chosen))


@triton.jit
def add_rows_kernel(
    y,
    x,
    channels,
    packed,
    scale,
    y_stride,
    x_stride,
    channels_stride,
    chosen,
    words,
    out_features,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grid (programs, tokens). Programs take blocks of words in turn; of a block, one program adds all the chosen rows."""
    PER_WORD: tl.constexpr = 32 // BITS
    token = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, PER_WORD)
    for first_word in tl.range(tl.program_id(0) * WORDS, words, tl.num_programs(0) * WORDS):
        word = first_word + tl.arange(0, WORDS)
        total = tl.zeros((WORDS, PER_WORD), tl.float32)
        for first_row in tl.range(0, chosen, ROWS):
            row = first_row + tl.arange(0, ROWS)
            channel = tl.load(channels + token * channels_stride + row, mask=row < chosen, other=0).to(tl.int64)
            value = tl.load(x + token * x_stride + channel, mask=row < chosen, other=0.0).to(tl.float32)
            codes = tl.load(
                packed + channel[:, None] * words + word[None, :],
                mask=(row < chosen)[:, None] & (word < words)[None, :],
                other=0,
                eviction_policy="evict_first",
            )
            unsigned = (codes[:, :, None] >> (lane * BITS)[None, None, :]) & ((1 << BITS) - 1)
            signed = (unsigned - (1 << (BITS - 1))).to(tl.float32)
            total += tl.sum(signed * value[:, None, None], axis=0)
        column = word[:, None] * PER_WORD + lane[None, :]
        inside = column < out_features
        total *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
        target = y + token * y_stride + column
        if ACCUMULATE:
            total += tl.load(target, mask=inside, other=0.0)
        tl.store(target, total, mask=inside)
