"""Products with integer weights: both kernels against the reference in float64, and exactly where numbers are integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.layout import PackedWeight, PreparedInput, prepare_weight
from counterweight.kernels.gpu.weight_gemm import decode_tiling, dense_tiling, splits_of, weight_gemm, whole_splits
from counterweight.kernels.reference import linear
from tests.kernels.gpu.guarded import guarded
from tests.kernels.gpu.poisoned import poisoned
from tests.kernels.gpu.prepared import prepare, projected, random_input, random_low_rank, random_weight, relative_error

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Decoding: products of an integer and a number of x are exact in float32, so only their sums round: by at most K / 2 units of
# 2**-23 of the sum of magnitudes for K columns in any order, by K where a tensor core truncates. 4e-7 was seen on a CPU.
# Prefill: weights are rounded to the dtype.
DECODE_TOLERANCE = 1e-5
DENSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def outputs() -> Iterator[list[Tensor]]:
    """What is allocated is full of NaN and between guard bands, which are intact in the end."""
    with poisoned(needed=False) as allocated:
        yield allocated


def guard(weight: PackedWeight) -> PackedWeight:
    """The same weight between guard bands."""
    return replace(
        weight,
        planes=tuple(guarded(plane) for plane in weight.planes),
        scale=guarded(weight.scale),
        offset=None if weight.offset is None else guarded(weight.offset),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "tokens"), [(2, 128, 1), (3, None, 5), (4, 128, 5), (4, 64, 11), (4, None, 17), (8, 128, 9)]
)
@pytest.mark.parametrize("decoding", [True, False])
def test_equals_the_reference_on_ragged_shapes(
    device: torch.device,
    outputs: list[Tensor],
    decoding: bool,
    bits: int,
    group_size: int | None,
    tokens: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(1, 130, 300, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype).to(device)
    packed = guard(prepare_weight(weight))
    x = random_input(2, tokens, 300, dtype).to(device)
    y = weight_gemm(prepare(x), packed, out_dtype=torch.float32, decoding=decoding)
    tolerance = DECODE_TOLERANCE if decoding else DENSE_TOLERANCE[dtype]
    assert relative_error(y, linear(x, weight)) < tolerance
    assert any(y is tensor for tensor in outputs)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("decoding", [True, False])
def test_small_groups_of_other_widths(device: torch.device, decoding: bool, group_size: int, bits: int) -> None:
    weight = random_weight(3, 128, 256, bits=bits, group_size=group_size, symmetric=False).to(device)
    packed = guard(prepare_weight(weight))
    x = random_input(4, 3, 256, torch.float16).to(device)
    y = weight_gemm(prepare(x), packed, out_dtype=torch.float32, decoding=decoding)
    tolerance = DECODE_TOLERANCE if decoding else DENSE_TOLERANCE[torch.float16]
    assert relative_error(y, linear(x, weight)) < tolerance


@pytest.mark.parametrize("factors", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rank", [1, 45])
@pytest.mark.parametrize("decoding", [True, False])
def test_whole_layer_in_one_kernel(
    device: torch.device, decoding: bool, rank: int, splits: int, factors: torch.dtype
) -> None:
    weight = random_weight(5, 130, 300).to(device)
    packed = guard(prepare_weight(weight))
    x = random_input(6, 5, 300, torch.float32).to(device)
    low_rank = random_low_rank(7, 130, 300, rank, factors).to(device)
    bias = torch.linspace(-3, 3, 130).to(device)
    prepared = prepare(x, bits=8, projection=projected(x, low_rank))
    up = guarded(low_rank.up)
    y = weight_gemm(prepared, packed, up=up, bias=guarded(bias), splits=splits, decoding=decoding)
    parts = {"low_rank": low_rank, "bias": bias, "activations": ActivationFormat(bits=8)}
    assert relative_error(y, linear(x, weight, **parts)) < 1e-5
    for left_out in parts:
        without = linear(x, weight, **{name: part for name, part in parts.items() if name != left_out})
        assert relative_error(y, without) > 1e-4, f"{left_out} does nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoding", [True, False])
def test_result_has_the_dtype_of_the_input(device: torch.device, decoding: bool, dtype: torch.dtype) -> None:
    weight = random_weight(8, 64, 128, dtype=dtype).to(device)
    packed = prepare_weight(weight)
    x = random_input(9, 3, 128, dtype).to(device)
    low_rank = random_low_rank(10, 64, 128, 8, dtype).to(device)
    prepared = prepare(x, projection=projected(x, low_rank))
    y = weight_gemm(prepared, packed, up=low_rank.up, decoding=decoding)
    assert y.dtype is dtype
    assert relative_error(y, linear(x, weight, low_rank=low_rank)) < DENSE_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [64, 128, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_codes_are_multiplied_exactly(
    device: torch.device, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(
        11, 128, 512, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype, unit_scale=True
    )
    half = 1 << (bits - 1)
    weight.codes[0], weight.codes[1] = half - 1, -half
    codes = torch.randint(-128, 128, (9, 512), generator=torch.Generator().manual_seed(12))
    codes[0] = 127
    weight, packed = weight.to(device), guard(prepare_weight(weight.to(device)))
    prepared = prepare(codes.to(dtype).to(device))
    y = weight_gemm(prepared, packed, out_dtype=torch.float32, splits=2, decoding=True)
    centred = weight.codes.cpu().long()
    if weight.zero_point is not None:
        repeat = group_size or 512
        centred = centred - weight.zero_point.cpu().long().repeat_interleave(repeat, 1)
    assert torch.equal(y.cpu().long(), codes @ centred.T)


@pytest.mark.parametrize("bits", [4, 8])
def test_step_multiplies_codes_of_activations(device: torch.device, bits: int) -> None:
    weight = random_weight(13, 128, 256).to(device)
    packed = prepare_weight(weight)
    x = random_input(14, 4, 256, torch.float16).to(device)
    y = weight_gemm(prepare(x, bits=bits), packed, out_dtype=torch.float32)
    expected = linear(x, weight, activations=ActivationFormat(bits=bits))
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y, linear(x, weight)) > 1e-4


@pytest.mark.parametrize("decoding", [True, False])
def test_splits_are_added_in_their_order(device: torch.device, decoding: bool) -> None:
    weight = random_weight(15, 128, 512, group_size=128).to(device)
    x = random_input(16, 3, 512, torch.float32).to(device)
    total = torch.zeros(3, 128, device=device)
    for half in (slice(0, 2), slice(2, 4)):
        columns = slice(half.start * 128, half.stop * 128)
        part = prepare_weight(replace(weight, codes=weight.codes[:, columns], scale=weight.scale[:, half]))
        total += weight_gemm(prepare(x[:, columns].contiguous()), part, splits=1, decoding=decoding)
    packed = prepare_weight(weight)
    prepared = prepare(x)
    y = weight_gemm(prepared, packed, splits=2, decoding=decoding)
    assert torch.equal(y, total)
    assert torch.equal(y, weight_gemm(prepared, packed, splits=2, decoding=decoding))
    assert not torch.equal(y, weight_gemm(prepared, packed, splits=1, decoding=decoding))


def test_no_tokens_no_work(device: torch.device) -> None:
    packed = prepare_weight(random_weight(17, 128, 128).to(device))
    empty = prepare(torch.zeros(0, 128, dtype=torch.float16, device=device))
    assert weight_gemm(empty, packed).shape == (0, 128)


@pytest.mark.parametrize(
    ("change", "up", "message"),
    [
        ({"values": torch.zeros(3, 200)}, None, r"values: \[3, 200\].*expected \[3, 256\]"),
        ({"values": torch.zeros(256, 3).T}, None, "values: .*not contiguous"),
        ({"step": torch.zeros(2)}, None, r"step: \[2\]"),
        ({"projected": torch.zeros(3, 8)}, None, "up, projected"),
        ({"projected": torch.zeros(3, 8)}, torch.zeros(130, 9), r"up: \[130, 9\].*expected \[130, 8\]"),
        ({"values": torch.zeros(3, 256, dtype=torch.float64)}, None, "dtype: torch.float64"),
    ],
)
def test_refuses_what_does_not_go_together(
    device: torch.device, change: dict[str, Tensor | None], up: Tensor | None, message: str
) -> None:
    packed = prepare_weight(random_weight(18, 130, 256).to(device))
    prepared = prepare(random_input(19, 3, 256, torch.float32).to(device))
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in change.items()}
    changed: PreparedInput = replace(prepared, **moved)
    with pytest.raises(ValueError, match=message):
        weight_gemm(changed, packed, up=None if up is None else up.to(device))


@pytest.mark.parametrize("blocks", [1, 2, 5, 32, 112])
@pytest.mark.parametrize("tiles", [1, 2, 32, 100, 300])
def test_no_split_is_empty(tiles: int, blocks: int) -> None:
    splits = splits_of(tiles, blocks)
    share = -(-blocks // splits)
    assert (splits - 1) * share < blocks <= splits * share
    assert splits == 1 or (share >= 4 and splits * tiles <= 264)
    assert whole_splits(4, 5) == 3


def test_tiles_grow_with_tokens() -> None:
    assert [decode_tiling(tokens, 4, torch.bfloat16, 9).bm for tokens in (1, 8, 9, 16, 17, 32)] == [
        8,
        8,
        16,
        16,
        32,
        32,
    ]
    assert [dense_tiling(tokens, torch.bfloat16, 128, 9).bm for tokens in (33, 64, 65, 128, 129)] == [
        64,
        64,
        128,
        128,
        256,
    ]
    assert [dense_tiling(4096, torch.bfloat16, 128, major).bm for major in (8, 9, 10, 12)] == [64, 256, 128, 64]
