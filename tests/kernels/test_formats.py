"""What a quantized weight and a low-rank branch mean, element by element."""

from __future__ import annotations

import pytest
import torch

from counterweight.kernels.formats import LowRank
from counterweight.kernels.weights.uniform import UniformWeight


def weight(group_size: int | None, *, symmetric: bool, columns: int = 12) -> UniformWeight:
    """[3, columns] of 4 bits with arbitrary codes, scales (one negative) and zero points."""
    generator = torch.Generator().manual_seed(1)
    groups = 1 if group_size is None else -(-columns // group_size)
    scale = torch.rand(3, groups, generator=generator) + 0.1
    scale[1, 0] *= -1
    return UniformWeight(
        codes=torch.randint(-8, 8, (3, columns), generator=generator).to(torch.int8),
        scale=scale.to(torch.bfloat16),
        zero_point=None if symmetric else torch.randint(-8, 8, (3, groups), generator=generator).to(torch.int8),
        bits=4,
        group_size=group_size,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 4, 5])
def test_dequantize_is_code_minus_zero_times_scale(group_size: int | None, symmetric: bool) -> None:
    found = weight(group_size, symmetric=symmetric)
    dense = found.dequantize(torch.float64)
    for row in range(3):
        for column in range(12):
            group = 0 if group_size is None else column // group_size
            zero = 0 if found.zero_point is None else int(found.zero_point[row, group])
            centred = int(found.codes[row, column]) - zero
            assert float(dense[row, column]) == pytest.approx(centred * float(found.scale[row, group]), rel=1e-7)


def test_extreme_codes_and_zero_points_do_not_overflow_int8() -> None:
    extreme = UniformWeight(
        codes=torch.tensor([[127, -128]], dtype=torch.int8),
        scale=torch.ones(1, 2),
        zero_point=torch.tensor([[-128, 127]], dtype=torch.int8),
        bits=8,
        group_size=1,
    )
    assert extreme.dequantize().tolist() == [[255.0, -255.0]]


def test_dequantize_rounds_once() -> None:
    """The product is formed in float32 and cast, not formed in the 16-bit type."""
    found = weight(4, symmetric=True)
    assert torch.equal(found.dequantize(torch.bfloat16), found.dequantize().to(torch.bfloat16))
    assert found.dequantize(torch.bfloat16).dtype is torch.bfloat16


def test_moving_keeps_everything() -> None:
    meta = torch.device("meta")
    moved = weight(4, symmetric=False).to(meta)
    assert moved.zero_point is not None
    assert (moved.codes.device, moved.scale.device, moved.zero_point.device) == (meta, meta, meta)
    assert (moved.bits, moved.group_size) == (4, 4)
    assert weight(4, symmetric=True).to(meta).zero_point is None


def test_a_branch_multiplied_out() -> None:
    generator = torch.Generator().manual_seed(2)
    branch = LowRank(
        up=torch.randn(5, 2, generator=generator).bfloat16(), down=torch.randn(2, 7, generator=generator).bfloat16()
    )
    expected = branch.up.double() @ branch.down.double()
    torch.testing.assert_close(branch.product(torch.float64), expected, rtol=1e-6, atol=1e-6)
    assert branch.rank == 2
    assert branch.to(torch.device("meta")).up.is_meta
