"""The integer kernel's sums are those of int64 arithmetic, and the layer around them is the reference's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.activations import prepare
from counterweight.kernels.gpu.integer_gemm import IntegerWeight, integer_gemm, prepare_integer, unsupported
from counterweight.kernels.gpu.layout import PreparedInput
from counterweight.kernels.reference import linear
from counterweight.kernels.weights.uniform import UniformWeight
from tests.kernels.gpu.guarded import bands_are_intact, guarded
from tests.kernels.gpu.poisoned import poisoned

GRIDS = [
    pytest.param(4, 128, False, 256, id="4 bits, groups of 128"),
    pytest.param(4, 128, True, 256, id="4 bits, groups of 128, asymmetric"),
    pytest.param(4, 64, True, 192, id="4 bits, groups of 64, asymmetric"),
    pytest.param(4, 32, True, 128, id="4 bits, groups of 32, asymmetric"),
    pytest.param(4, 256, True, 512, id="4 bits, groups of 256, asymmetric"),
    pytest.param(4, None, False, 256, id="4 bits per channel"),
    pytest.param(4, None, True, 288, id="4 bits per channel, asymmetric, ragged"),
    pytest.param(4, None, False, 32, id="4 bits per channel, less than a unit"),
    pytest.param(3, 64, True, 128, id="3 bits"),
    pytest.param(2, None, True, 160, id="2 bits"),
    pytest.param(8, 128, True, 256, id="8 bits, groups of 128, asymmetric"),
    pytest.param(8, 32, True, 96, id="8 bits, groups of 32, asymmetric"),
    pytest.param(8, None, False, 160, id="8 bits per channel, ragged"),
    pytest.param(8, None, True, 256, id="8 bits per channel, asymmetric"),
]
ANY_GRID = pytest.mark.parametrize(("bits", "group_size", "asymmetric", "columns"), GRIDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(
    bits: int, group_size: int | None, asymmetric: bool, columns: int, *, rows: int = 40, extreme: bool = False
) -> UniformWeight:
    """Random codes and zero points; extreme: the ends of their range alone, and scales of 1."""
    groups, half = (1 if group_size is None else columns // group_size), 1 << (bits - 1)

    def codes(*shape: int) -> Tensor:
        if extreme:
            return torch.where(torch.rand(shape, generator=generator()) < 0.8, -half, half - 1).to(torch.int8)
        return torch.randint(-half, half, shape, generator=generator(), dtype=torch.int8)

    scale = torch.ones(rows, groups) if extreme else torch.rand(rows, groups, generator=generator()) + 0.5
    return UniformWeight(
        codes=codes(rows, columns),
        scale=scale.bfloat16(),
        zero_point=codes(rows, groups) if asymmetric else None,
        bits=bits,
        group_size=group_size,
    )


def prepared_codes(codes: Tensor, weight: IntegerWeight) -> PreparedInput:
    """Codes [tokens, in] with a step of 1, as `prepare` would give them."""
    blocks = torch.nn.functional.pad(codes.float(), (0, weight.blocks * weight.block - codes.shape[1]))
    return PreparedInput(
        values=guarded(codes),
        step=torch.ones(len(codes), device=codes.device),
        sums=guarded(blocks.unflatten(1, (weight.blocks, -1)).sum(2)),
        projected=None,
    )


def move(weight: IntegerWeight, device: torch.device) -> IntegerWeight:
    """The weight between bands of poison."""
    zero_point = None if weight.zero_point is None else guarded(weight.zero_point.to(device))
    codes, scale = guarded(weight.codes.to(device)), guarded(weight.scale.to(device))
    return replace(weight, codes=codes, scale=scale, zero_point=zero_point)


def exact_product(codes: Tensor, weight: UniformWeight) -> Tensor:
    """sum_k x (q - zero), [tokens, out] int64."""
    centred = weight.codes.long()
    if weight.zero_point is not None:
        repeat = weight.group_size or centred.shape[1]
        centred = centred - weight.zero_point.long().repeat_interleave(repeat, dim=1)
    return codes.long() @ centred.T


@ANY_GRID
def test_sums_of_extreme_codes_are_exact(
    bits: int, group_size: int | None, asymmetric: bool, columns: int, device: torch.device
) -> None:
    weight = make_weight(bits, group_size, asymmetric, columns, extreme=True)
    codes = torch.where(torch.rand(5, columns, generator=generator(1)) < 0.9, -128, 127).to(torch.int8)
    arranged = move(prepare_integer(weight), device)
    x = prepared_codes(codes.to(device), arranged)
    with poisoned():
        y = integer_gemm(x, arranged, out_dtype=torch.float32)
    assert torch.equal(y.cpu().long(), exact_product(codes, weight))
    assert bands_are_intact(x.values)
    assert bands_are_intact(arranged.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_the_longest_rows_stay_within_int32(bits: int, device: torch.device) -> None:
    half, columns = 1 << (bits - 1), 1 << 16
    weight = UniformWeight(
        codes=torch.full((1, columns), half - 1, dtype=torch.int8),
        scale=torch.ones(1, 1),
        zero_point=torch.full((1, 1), -half, dtype=torch.int8),
        bits=bits,
        group_size=None,
    )
    codes = torch.full((1, columns), -128, dtype=torch.int8)
    arranged = prepare_integer(weight.to(device))
    y = integer_gemm(prepared_codes(codes.to(device), arranged), arranged, out_dtype=torch.float32)
    assert torch.equal(y.cpu(), exact_product(codes, weight).float())


@ANY_GRID
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_is_the_reference(
    bits: int, group_size: int | None, asymmetric: bool, columns: int, tokens: int, device: torch.device
) -> None:
    weight = make_weight(bits, group_size, asymmetric, columns)
    compare(weight, tokens, device, rank=24, biased=True)


@pytest.mark.parametrize(("tokens", "rows"), [(65, 72), (130, 64), (260, 8)])
def test_tiles_of_each_height_are_the_same_layer(tokens: int, rows: int, device: torch.device) -> None:
    compare(make_weight(4, 64, True, 128, rows=rows), tokens, device, rank=5, biased=True)


@pytest.mark.parametrize("rank", [0, 1, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("integer_factors", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_branch_and_bias(rank: int, biased: bool, integer_factors: bool, bits: int, device: torch.device) -> None:
    compare(
        make_weight(4, 64, False, 64),
        3,
        device,
        rank=rank,
        biased=biased,
        integer_factors=integer_factors,
        activations=ActivationFormat(bits=bits),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_results_are_rounded_to_halves(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    compare(make_weight(4, 64, True, 128), 3, device, rank=8, biased=True, out_dtype=dtype, tolerance=tolerance)


def compare(
    weight: UniformWeight,
    tokens: int,
    device: torch.device,
    *,
    rank: int = 0,
    biased: bool = False,
    integer_factors: bool = False,
    activations: ActivationFormat | None = None,
    out_dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """A whole layer, of float32 inputs, against the reference in float64."""
    rows, columns = weight.codes.shape
    x = torch.randn(tokens, columns, generator=generator(2))
    low_rank = make_low_rank(rows, columns, rank, integer_factors).to(device) if rank else None
    step = None
    if low_rank is not None and low_rank.up_scale is not None and low_rank.down_scale is not None:
        step = low_rank.up_scale * low_rank.down_scale
    bias = 10 * torch.randn(rows, generator=generator(3)).to(device) if biased else None
    activations = activations or ActivationFormat(bits=8)
    arranged = move(prepare_integer(weight), device)
    down, up = (None, None) if low_rank is None else (low_rank.down, guarded(low_rank.up))
    inputs = prepare(x.to(device), arranged, activations=activations, down=down, step=step)
    with poisoned():
        y = integer_gemm(inputs, arranged, up=up, bias=bias, out_dtype=out_dtype)
    expected = linear(
        x,
        weight,
        low_rank=None if low_rank is None else low_rank.to(torch.device("cpu")),
        bias=None if bias is None else bias.cpu(),
        activations=activations,
    )
    assert y.dtype is out_dtype
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error <= tolerance, float(error)


def make_low_rank(rows: int, columns: int, rank: int, integer: bool) -> LowRank:
    if not integer:
        up, down = (torch.randn(*shape, generator=generator(4)) for shape in ((rows, rank), (rank, columns)))
        return LowRank(up=up, down=down)
    up, down = (
        torch.randint(-127, 128, shape, generator=generator(4), dtype=torch.int8)
        for shape in ((rows, rank), (rank, columns))
    )
    up_scale, down_scale = (torch.rand(rank, generator=generator(seed)) * 0.02 + 0.01 for seed in (5, 6))
    return LowRank(up=up, down=down, up_scale=up_scale, down_scale=down_scale)


def test_halves_of_a_unit_share_bytes() -> None:
    weight = make_weight(4, 64, False, 128, rows=3)
    packed = prepare_integer(weight).codes.view(3, 2, 32)
    units = weight.codes.view(3, 2, 2, 32)
    assert torch.equal(packed << 4 >> 4, units[:, :, 0])
    assert torch.equal(packed >> 4, units[:, :, 1])


@pytest.mark.parametrize(
    ("columns", "group_size", "bits", "reason"),
    [
        (128, 48, 4, "group_size: 48"),
        (200, None, 4, "in_features: 200: expected a multiple of 32"),
        (96, 32, 4, "in_features: 96: expected a multiple of 64 for group_size 32"),
        (96, 64, 8, "in_features: 96: expected a multiple of 64 for group_size 64"),
        (2**16 + 32, None, 4, "in_features: 65568: expected at most 65536"),
    ],
)
def test_other_weights_are_refused(columns: int, group_size: int | None, bits: int, reason: str) -> None:
    groups = 1 if group_size is None else -(-columns // group_size)
    weight = UniformWeight(
        codes=torch.zeros(1, columns, dtype=torch.int8),
        scale=torch.ones(1, groups),
        zero_point=None,
        bits=bits,
        group_size=group_size,
    )
    assert reason in str(unsupported(weight))
    with pytest.raises(ValueError, match=reason):
        prepare_integer(weight)


def test_supported_weights_have_no_reason() -> None:
    assert unsupported(make_weight(4, 128, True, 256)) is None
    assert unsupported(make_weight(8, 32, True, 96)) is None
    assert unsupported(make_weight(4, None, False, 96)) is None


def test_inputs_that_do_not_fit_are_refused(device: torch.device) -> None:
    weight = move(prepare_integer(make_weight(4, 64, True, 128)), device)
    x = prepared_codes(torch.ones(2, 128, dtype=torch.int8, device=device), weight)
    up = torch.ones(40, 4, device=device)
    projected = torch.ones(2, 4, device=device)
    for bad, keywords, what in (
        (replace(x, values=x.values.float()), {}, "x: torch.float32"),
        (replace(x, values=x.values[:, :64]), {}, r"x: torch.int8 \[2, 64\]: expected int8 \[tokens, 128\]"),
        (replace(x, step=None), {}, "with their steps"),
        (replace(x, sums=None), {}, r"x.sums: None: expected \[2, 2\]"),
        (x, {"up": up}, "up: given"),
        (replace(x, projected=projected), {}, "up: none"),
        (replace(x, projected=projected), {"up": up[:, :3]}, r"up: \[40, 3\]: expected \[40, 4\]"),
        (x, {"bias": up[:, 0][:5]}, r"bias: \[5\]: expected \[40\]"),
    ):
        with pytest.raises(ValueError, match=what):
            integer_gemm(bad, weight, out_dtype=torch.float32, **keywords)
    with pytest.raises(ValueError, match=r"dtype: torch\.float64"):
        integer_gemm(x, weight, out_dtype=torch.float64)
