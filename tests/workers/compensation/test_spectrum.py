"""What the directions of a branch hold, against the singular values of everything that it adds."""

from __future__ import annotations

import pytest
import torch

from counterweight.kernels.formats import LowRank
from counterweight.workers.compensation.spectrum import counts, spectrum


def test_directions_are_counted_in_powers_of_two_up_to_the_rank() -> None:
    assert [counts(rank) for rank in (1, 2, 3, 8, 13)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 13]]


@pytest.mark.parametrize(("tokens", "rows", "columns", "rank"), [(64, 24, 32, 6), (3, 24, 32, 6), (64, 5, 32, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_directions_hold_what_singular_values_say(
    tokens: int, rows: int, columns: int, rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens + rows)
    up, down, x = (
        torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns), (tokens, columns))
    )
    up *= torch.logspace(0, -2, rank)
    branch, x = LowRank(up=up.to(dtype), down=down.to(dtype)), x.to(dtype)
    added = x.double() @ (branch.up.double() @ branch.down.double()).T
    energies = torch.linalg.svdvals(added).square()
    expected = [float(energies[:count].sum() / energies.sum()) for count in counts(rank)]
    assert spectrum(branch, x) == pytest.approx(expected, rel=1e-5)
    assert spectrum(branch, x)[-1] == pytest.approx(1.0)


def test_a_branch_that_adds_nothing_has_no_spectrum() -> None:
    branch = LowRank(up=torch.zeros(4, 2), down=torch.ones(2, 3))
    assert spectrum(branch, torch.ones(5, 3)) == ()
