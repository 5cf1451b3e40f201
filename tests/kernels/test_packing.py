"""The packed layout against compressed-tensors' own, and what a reader refuses."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterweight.kernels.forms import WeightForm
from counterweight.kernels.weights.packing import pack, packed_width, unpack
from counterweight.kernels.weights.uniform import UniformWeight

BITS = (2, 3, 4, 8)


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


def quantized(
    rows: int = 6, columns: int = 96, bits: int = 4, group_size: int | None = 32, symmetric: bool = True
) -> UniformWeight:
    groups = 1 if group_size is None else -(-columns // group_size)
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(1)) + 0.5
    scale[::2] *= -1  # a scale may have either sign
    return UniformWeight(
        codes=codes(rows, columns, bits),
        scale=scale,
        zero_point=None if symmetric else codes(rows, groups, bits, seed=2),
        bits=bits,
        group_size=group_size,
    )


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    dim=st.sampled_from((0, 1)),
    seed=st.integers(0, 2**31),
)
def test_layout_is_that_of_compressed_tensors(bits: int, rows: int, columns: int, dim: int, seed: int) -> None:
    original = codes(rows, columns, bits, seed)
    words = pack(original, bits, dim=dim)
    assert torch.equal(words, pack_to_int32(original, bits, dim))  # type: ignore[arg-type]
    assert torch.equal(unpack(words, bits, original.shape[dim], dim=dim), original)
    assert torch.equal(unpack_from_int32(words, bits, original.shape, dim), original)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_at_every_place_of_a_unit(bits: int) -> None:
    half = 1 << (bits - 1)
    values = torch.arange(-half, half, dtype=torch.int8)
    original = torch.full((32 * len(values), 32), -half, dtype=torch.int8)
    original[torch.arange(len(original)), torch.arange(len(original)) % 32] = values.repeat_interleave(32)
    assert torch.equal(unpack(pack(original, bits), bits, 32), original)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_are_left_as_they_were(bits: int) -> None:
    original = codes(4, 64, bits)
    words = pack(original, bits)
    before = words.clone()
    unpack(words, bits, 64)
    assert torch.equal(words, before)
    assert torch.equal(original, codes(4, 64, bits))


def test_three_bits_are_packed_densely() -> None:
    assert packed_width(32, 3) == 3
    assert pack(codes(2, 64, 3), 3).shape == (2, 6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_out_of_range_are_refused(bits: int) -> None:
    half = 1 << (bits - 1)
    for value in (half, -half - 1):
        with pytest.raises(ValueError, match=f"expected {-half} .. {half - 1}"):
            pack(torch.tensor([[0, value]], dtype=torch.int8), bits)


@pytest.mark.parametrize(
    ("value", "bits", "match"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), 4, "codes: int32"),
        (torch.zeros(8, dtype=torch.int8), 4, "2 dimensions"),
        (torch.zeros(2, 8, dtype=torch.int8), 5, "bits: 5"),
    ],
)
def test_pack_refuses(value: Tensor, bits: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pack(value, bits)


@pytest.mark.parametrize(
    ("value", "count", "match"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), 16, "words: int64"),
        (torch.zeros(2, 2, dtype=torch.int32), 17, "17 codes fill 3"),
        (torch.zeros(2, 2, dtype=torch.int32), 8, "8 codes fill 1"),
        (torch.zeros(2, 0, dtype=torch.int32), -1, "-1 codes"),
    ],
)
def test_unpack_refuses(value: Tensor, count: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        unpack(value, 4, count)


def test_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="dim: 2"):
        pack(codes(2, 8, 4), 4, dim=2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_what_we_write(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight = quantized(rows=37, bits=bits, group_size=group_size, symmetric=symmetric)
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    read = PackedQuantizationCompressor.decompress(weight.tensors(), scheme)
    assert torch.equal(read["weight"], weight.dequantize())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "group_size"), [(96, None), (96, 32), (33, None), (100, 32), (1, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(bits: int, columns: int, group_size: int | None, symmetric: bool) -> None:
    weight = quantized(rows=5, columns=columns, bits=bits, group_size=group_size, symmetric=symmetric)
    tensors = weight.tensors()
    assert tensors["weight_shape"].dtype == torch.int64
    assert ("weight_zero_point" in tensors) is not symmetric
    read = UniformWeight.from_tensors(tensors, WeightForm(bits=bits, group_size=group_size, symmetric=symmetric))
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.scale, weight.scale)
    assert (read.bits, read.group_size) == (bits, group_size)
    if weight.zero_point is None:
        assert read.zero_point is None
    else:
        assert read.zero_point is not None
        assert torch.equal(read.zero_point, weight.zero_point)


HOSTILE = {
    "no scale": ({"weight_scale": None}, "missing \\['weight_scale'\\]"),
    "a tensor too many": ({"weight_g_idx": torch.zeros(96)}, "not expected \\['weight_g_idx'\\]"),
    "a zero point where there is none": ({"weight_zero_point": torch.zeros(1, 3)}, "weight_zero_point"),
    "packed as int64": ({"weight_packed": torch.zeros(6, 12, dtype=torch.int64)}, "weight_packed: int64"),
    "packed too narrow": ({"weight_packed": torch.zeros(6, 11, dtype=torch.int32)}, "expected int32 \\[6, 12\\]"),
    "packed with other rows": ({"weight_packed": torch.zeros(7, 12, dtype=torch.int32)}, "expected int32 \\[6, 12\\]"),
    "packed in three dimensions": ({"weight_packed": torch.zeros(6, 12, 1, dtype=torch.int32)}, "weight_packed"),
    "shape as floats": ({"weight_shape": torch.tensor([6.0, 96.0])}, "weight_shape: float32"),
    "shape of three": ({"weight_shape": torch.tensor([6, 96, 1])}, "weight_shape: int64 \\[3\\]"),
    "a negative shape": ({"weight_shape": torch.tensor([-6, 96])}, "expected two positive sizes"),
    "a gigantic shape": ({"weight_shape": torch.tensor([2**62, 2**62])}, "weight_packed"),
    "an empty shape": ({"weight_shape": torch.tensor([0, 96])}, "expected two positive sizes"),
    "scale of integers": ({"weight_scale": torch.ones(6, 3, dtype=torch.int32)}, "weight_scale: int32"),
    "scale with too few groups": ({"weight_scale": torch.ones(6, 2)}, "expected .* \\[6, 3\\]"),
    "scale that is NaN": ({"weight_scale": torch.full((6, 3), torch.nan)}, "weight_scale: holds NaN"),
    "scale that is infinite": ({"weight_scale": torch.full((6, 3), torch.inf)}, "weight_scale: holds NaN or inf"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_reader_refuses(case: str) -> None:
    change, match = HOSTILE[case]
    tensors = {name: value for name, value in (quantized().tensors() | change).items() if value is not None}
    with pytest.raises(ValueError, match=match):
        UniformWeight.from_tensors(tensors, WeightForm(bits=4, group_size=32, symmetric=True))


def test_a_reader_refuses_what_contradicts_the_scheme() -> None:
    tensors = quantized().tensors()
    with pytest.raises(ValueError, match=r"missing \['weight_zero_point'\]"):
        UniformWeight.from_tensors(tensors, WeightForm(bits=4, group_size=32, symmetric=False))
    with pytest.raises(ValueError, match="weight_packed"):
        UniformWeight.from_tensors(tensors, WeightForm(bits=8, group_size=32, symmetric=True))
    with pytest.raises(ValueError, match="weight_scale"):
        UniformWeight.from_tensors(tensors, WeightForm(bits=4, group_size=None, symmetric=True))
    with pytest.raises(ValueError, match="group_size: 0"):
        UniformWeight.from_tensors(tensors, WeightForm(bits=4, group_size=0, symmetric=True))
    with pytest.raises(ValueError, match="bits: 6"):
        UniformWeight.from_tensors(tensors, WeightForm(bits=6, group_size=32, symmetric=True))
    asymmetric = quantized(symmetric=False).tensors() | {"weight_zero_point": torch.zeros(6, 3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"weight_zero_point: int32 \[6, 3\]: expected int32 \[1, 3\]"):
        UniformWeight.from_tensors(asymmetric, WeightForm(bits=4, group_size=32, symmetric=False))
