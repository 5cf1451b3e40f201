"""Words of packed codes, decoded one code at a time in plain integers; and what does not fit together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.workers.errors import CheckpointError
from counterweight.workers.foreign import format_of

IN, OUT, GROUP = 64, 32, 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output lies where in a word, from its lowest bits on."""


def drawn(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [in, out], zero points [groups, out] and scales [groups, out]; zero points of nought too."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (IN, OUT), generator=generator)
    zeros = torch.randint(0, 1 << bits, (IN // GROUP, OUT), generator=generator)
    return codes, zeros, torch.rand(IN // GROUP, OUT, generator=generator).half()


def words(values: list[int], bits: int, *, less_one: bool = False) -> list[int]:
    """Codes in words, the first in the lowest bits; as numbers of 32 bits with a sign."""
    per = 32 // bits
    packed = []
    for start in range(0, len(values), per):
        word = sum(value << bits * place for place, value in enumerate(values[start : start + per]))
        word = (word - less_one * sum(1 << bits * place for place in range(per))) % (1 << 32)
        packed.append(word - (1 << 32) if word >= 1 << 31 else word)
    return packed


def along_rows(values: Tensor, bits: int, *, less_one: bool = False) -> Tensor:
    return torch.tensor([words(row, bits, less_one=less_one) for row in values.tolist()], dtype=torch.int32)


def by_hand(codes: Tensor, zeros: Tensor, scales: Tensor, groups: list[int]) -> Tensor:
    weight = torch.empty(OUT, IN)
    for row in range(OUT):
        for column, group in enumerate(groups):
            weight[row, column] = float(scales[group, row]) * int(codes[column, row] - zeros[group, row])
    return weight


CONFIGS = [
    ({"quant_method": "gptq"}, True),
    ({"quant_method": "gptq", "checkpoint_format": "gptq"}, True),
    ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, False),
    ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, True),
    ({"quant_method": "auto-round"}, False),
]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("config", "less_one"), CONFIGS)
def test_gptq(config: dict[str, object], less_one: bool, bits: int) -> None:
    codes, zeros, scales = drawn(bits)
    tensors = {
        "a.qweight": along_rows(codes.T, bits).T.contiguous(),
        "a.qzeros": along_rows(zeros, bits, less_one=less_one),
        "a.scales": scales,
        "norm.weight": torch.ones(3),
    }
    packing = format_of(config)
    assert packing is not None
    found = packing.weights(tensors)
    assert sorted(found) == ["a.weight", "norm.weight"]
    torch.testing.assert_close(found["a.weight"], by_hand(codes, zeros, scales, [0] * 32 + [1] * 32), rtol=0, atol=0)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0)) % 2
    found = packing.weights({**tensors, "a.g_idx": order.int()})
    torch.testing.assert_close(found["a.weight"], by_hand(codes, zeros, scales, order.tolist()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "config", [{"quant_method": "awq"}, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}]
)
def test_awq(config: dict[str, object]) -> None:
    codes, zeros, scales = drawn(4)
    order = [8 * (column // 8) + AWQ[column % 8] for column in range(OUT)]
    packing = format_of(config)
    assert packing is not None
    tensors = {
        "a.qweight": along_rows(codes[:, order], 4),
        "a.qzeros": along_rows(zeros[:, order], 4),
        "a.scales": scales,
    }
    found = packing.weights(tensors)["a.weight"]
    torch.testing.assert_close(found, by_hand(codes, zeros, scales, [0] * 32 + [1] * 32), rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "auto-round", "packing_format": ["auto_round"]},
    ],
)
def test_what_is_not_known_is_left_to_transformers(config: dict[str, object]) -> None:
    assert format_of(config) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"a.qzeros": None}, "a: qzeros: expected a matrix"),
        ({"a.qweight": torch.zeros(8, OUT)}, "a: qweight: torch.float32: expected int32"),
        ({"a.scales": torch.ones(2, OUT + 8)}, "a: codes of 3.2 bits: expected 2, 4 or 8"),
        ({"a.scales": torch.ones(0, 0)}, "a: codes of"),
        ({"a.qweight": torch.zeros(8, OUT + 1, dtype=torch.int32)}, r"a: codes \[64, 33\], zero points \[2, 32\]"),
        ({"a.qweight": torch.zeros(9, OUT, dtype=torch.int32), "a.qzeros": None}, "a: qzeros: expected a matrix"),
        ({"a.g_idx": torch.full((IN,), 2)}, r"a: g_idx \[64\]: expected \[64\] of numbers below 2"),
        ({"a.g_idx": torch.zeros(3)}, r"a: g_idx \[3\]: expected \[64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Tensor | None], problem: str) -> None:
    tensors = {
        "a.qweight": torch.zeros(8, OUT, dtype=torch.int32),
        "a.qzeros": torch.zeros(2, OUT // 8, dtype=torch.int32),
        "a.scales": torch.ones(2, OUT),
        **change,
    }
    packing = format_of({"quant_method": "gptq"})
    assert packing is not None
    with pytest.raises(CheckpointError, match=f"^{problem}"):
        packing.weights({name: tensor for name, tensor in tensors.items() if tensor is not None})
