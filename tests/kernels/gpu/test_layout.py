"""Weights and inputs as kernels read them: each code is where the layout says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import QuantizedWeight
from counterweight.kernels.gpu.layout import (
    PackedWeight,
    permute_columns,
    permuted_run,
    prepare_weight,
    stack_weights,
    unsupported,
)
from tests.kernels.gpu.prepared import random_weight


def fields(words: Tensor, width: int, count: int) -> Tensor:
    """The fields of `width` bits of each word, lowest first: [rows, words * count] int64."""
    shifts = torch.arange(count) * width
    return ((words.to(torch.int64).unsqueeze(2) >> shifts) & ((1 << width) - 1)).flatten(1)


def codes_of(packed: PackedWeight) -> Tensor:
    """u [rows, columns], read from the planes bit by bit."""
    if packed.bits == 8:
        return packed.planes[0].to(torch.int64)
    if packed.bits == 3:
        low, high = packed.planes
        return fields(low, 2, 16) + 4 * fields(high, 1, 16)
    return fields(packed.planes[0], packed.bits, 32 // packed.bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"), [(130, 200, 64), (128, 256, 128), (7, 100, None)]
)
def test_holds_the_weight_padded_to_tiles(
    bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int | None
) -> None:
    weight = random_weight(0, out_features, in_features, bits=bits, group_size=group_size, symmetric=symmetric)
    packed = prepare_weight(weight)
    assert (packed.rows, packed.columns) == (-(-out_features // 128) * 128, -(-in_features // 128) * 128)
    assert packed.block == min(128, group_size or 128)
    first = 0 if bits == 8 else 2 ** (bits - 1)
    offset = torch.full_like(packed.scale, first, dtype=torch.float32) if packed.offset is None else packed.offset
    numbers = codes_of(packed) - offset.T.repeat_interleave(packed.group_size, 1)
    dense = numbers * packed.scale.T.float().repeat_interleave(packed.group_size, 1)
    assert torch.equal(dense[:out_features, :in_features], weight.dequantize())
    padding = torch.ones_like(dense, dtype=torch.bool)
    padding[:out_features, :in_features] = False
    assert not codes_of(packed)[padding].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_permuted_columns_lie_as_words_hold_them(bits: int) -> None:
    run = permuted_run(bits)
    places = torch.arange(128)
    expected = places // run * run + places % run // 2 + places % 2 * (run // 2)
    assert torch.equal(permute_columns(torch.arange(128).expand(3, 128), bits), expected.expand(3, 128))


def test_permutation_of_four_bits_is_the_documented_one() -> None:
    assert permute_columns(torch.arange(8), 4).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_stacks_experts_of_one_kind() -> None:
    weights = [prepare_weight(random_weight(seed, 128, 128, bits=3, symmetric=False)) for seed in range(3)]
    stacked = stack_weights(weights)
    assert (stacked.experts, stacked.rows, stacked.columns, stacked.groups) == (3, 128, 128, 1)
    assert torch.equal(stacked.planes[1][2], weights[2].planes[1])
    assert stacked.offset is not None
    assert weights[1].offset is not None
    assert torch.equal(stacked.offset[1], weights[1].offset)
    with pytest.raises(ValueError, match=r"expert 1: .*asymmetric"):
        stack_weights([prepare_weight(random_weight(0, 128, 128, bits=3)), weights[0]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 5}, "bits: 5"),
        ({"group_size": 48}, "group_size: 48"),
        ({"scale": torch.ones(4, 1).double()}, "scale: "),
    ],
)
def test_says_why_a_weight_is_refused(change: dict[str, object], reason: str) -> None:
    weight: QuantizedWeight = random_weight(0, 4, 128)
    assert unsupported(weight) is None
    refused = replace(weight, **change)
    assert reason in str(unsupported(refused))
    with pytest.raises(ValueError, match=reason):
        prepare_weight(refused)
