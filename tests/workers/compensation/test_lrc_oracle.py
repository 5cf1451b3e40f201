"""LRC's objective and Update-LR on many kinds of input, against the tokens themselves in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.compensation.lrc import energy, squared_error, updated_branch
from counterweight.workers.methods.compensations import LRC
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from tests.workers.kinds import KINDS, Layer

NEGLIGIBLE = 1e-8
"""A damping that does not matter."""


class Streams:
    """A layer of one kind: t, its input in the original model; x, what compressed blocks make of it; y = Q(x)."""

    def __init__(self, kind: str, bits: int | None, moved: float) -> None:
        layer = Layer(kind, bits=bits, rows=40, width=64, tokens=1024)
        noise = torch.randn(layer.seen.shape, generator=torch.Generator().manual_seed(1))
        self.weight, self.t = layer.weight, layer.seen
        self.x = self.t + moved * self.t.square().mean().sqrt() * noise
        self.y = self.x if layer.activations is None else fake_quantize_activations(self.x, layer.activations)
        gathering = Gathering(activations=layer.activations)
        accumulator = Accumulator(64, gathering=gathering)
        accumulator.add(ShardMoments.of(self.x, gathering, self.t if moved else None))
        self.statistics: InputStatistics = accumulator.result()
        stored = RTN().quantize(layer.weight, None, WeightFormat(bits=3), scale_dtype=torch.float32).weight
        self.codes = stored.dequantize()

    def wanted(self) -> Tensor:
        """W t - Q y, [tokens, out] float64: what the branch is to make of x."""
        return self.t.double() @ self.weight.double().T - self.y.double() @ self.codes.double().T

    def unit(self) -> float:
        """||W t||^2."""
        return float((self.t.double() @ self.weight.double().T).square().sum())

    def loss(self, branch: LowRank) -> float:
        """||W t - Q y - L x||^2 / ||W t||^2."""
        left = self.wanted() - self.x.double() @ branch.down.double().T @ branch.up.double().T
        return float(left.square().sum()) / self.unit()


@pytest.fixture(params=[(4, 0.0), (8, 0.0), (4, 0.2), (None, 0.2)], ids=["A4", "A8", "A4 moved", "A16 moved"])
def case(request: pytest.FixtureRequest) -> tuple[int | None, float]:
    found: tuple[int | None, float] = request.param
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_from_moments_is_that_of_the_tokens(kind: str, case: tuple[int | None, float]) -> None:
    streams = Streams(kind, *case)
    source = torch.Generator().manual_seed(2)
    branch = LowRank(up=0.1 * torch.randn(40, 3, generator=source), down=0.1 * torch.randn(3, 64, generator=source))
    found = squared_error(streams.weight.double(), streams.codes.double(), branch, streams.statistics)
    unit = energy(streams.weight.double(), streams.statistics)
    assert unit == pytest.approx(streams.unit(), rel=1e-5)
    assert found / unit == pytest.approx(streams.loss(branch), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_update_lr_is_reduced_rank_regression_on_the_tokens(kind: str, case: tuple[int | None, float]) -> None:
    """Least squares over the tokens, then the best approximation of what it fits (Izenman, 1975): no branch is better."""
    streams = Streams(kind, *case)
    wanted, inputs = streams.wanted(), streams.x.double()
    fitted = inputs @ torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    beyond_x = (wanted - fitted).square().sum()
    values = torch.linalg.svdvals(fitted)
    for rank in (2, 10, 40):
        branch = updated_branch(
            LRC(damping=NEGLIGIBLE),
            streams.weight.double(),
            streams.codes.double(),
            streams.statistics,
            rank,
            torch.float64,
        )
        least = float(beyond_x + values[rank:].square().sum()) / streams.unit()
        assert least * (1 - 1e-9) <= streams.loss(branch) <= least * (1 + 1e-4) + 1e-7
