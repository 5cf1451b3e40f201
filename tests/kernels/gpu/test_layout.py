"""Weights and inputs as kernels read them: each code is where the layout says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.gpu.layout import (
    PackedWeight,
    paired_columns,
    prepare_weight,
    stack_weights,
    unsupported,
)
from counterweight.kernels.weights.uniform import UniformWeight
from tests.kernels.gpu.prepared import random_weight


def fields(words: Tensor, width: int, count: int) -> Tensor:
    """The fields of `width` bits of each word, lowest first: [rows, words * count] int64."""
    shifts = torch.arange(count) * width
    return ((words.to(torch.int64).unsqueeze(2) >> shifts) & ((1 << width) - 1)).flatten(1)


def codes_of(packed: PackedWeight) -> Tensor:
    """u [rows, columns] in natural order, read from the planes bit by bit."""
    if packed.bits == 8:
        return packed.planes[0].to(torch.int64)
    width, count = (2, 16) if packed.bits == 3 else (packed.bits, 32 // packed.bits)
    stored = fields(packed.planes[0], width, count)
    if packed.bits == 3:
        stored = stored + 4 * fields(packed.planes[1], 1, 16)
    # Of the fields of a word, the lower half holds the even columns and the upper half the odd ones.
    lower, upper = stored.unflatten(1, (-1, 2, count // 2)).unbind(2)
    return torch.stack((lower, upper), dim=3).flatten(1)


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
    offset = torch.full_like(packed.scale, 2 ** (bits - 1)) if packed.offset is None else packed.offset
    numbers = codes_of(packed) - offset.T.long().repeat_interleave(packed.group_size, 1)
    dense = numbers * packed.scale.T.float().repeat_interleave(packed.group_size, 1)
    assert torch.equal(dense[:out_features, :in_features], weight.dequantize())
    padding = torch.ones_like(dense, dtype=torch.bool)
    padding[:out_features, :in_features] = False
    assert not codes_of(packed)[padding].any()


def test_pairs_of_columns_lie_half_a_word_apart() -> None:
    assert paired_columns(torch.arange(16), 4).tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert paired_columns(torch.arange(16), 2).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]


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
    weight: UniformWeight = random_weight(0, 4, 128)
    assert unsupported(weight) is None
    refused = replace(weight, **change)
    assert reason in str(unsupported(refused))
    with pytest.raises(ValueError, match=reason):
        prepare_weight(refused)
