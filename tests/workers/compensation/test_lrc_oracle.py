"""LRC's objective and Update-LR on many kinds of input, against the tokens themselves in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.compensation import lrc
from counterweight.workers.compensation.lrc import initial_branch, start_wins, updated_branch
from counterweight.workers.compensation.objective import energy, squared_error
from counterweight.workers.compensation.unseen import remainder
from counterweight.workers.methods.compensations import LRC, SVD
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.quantization.target import regressed, right_divide
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_codes_input_cannot_predict_is_semidefinite(kind: str, case: tuple[int | None, float]) -> None:
    statistics = Streams(kind, *case).statistics
    left = torch.linalg.eigvalsh(remainder(statistics, "xx", 0.01))
    assert float(left.min()) >= -1e-7 * float(statistics.gram.diagonal().max())
    if case[0] is None:  # y is x: what is left is what the damping keeps the regression from
        assert float(left.max()) <= 0.01 * float(statistics.gram.diagonal().mean()) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_holds_what_the_codes_input_cannot_predict(kind: str, case: tuple[int | None, float]) -> None:
    """Against the Schur complement as it is written in textbooks, in float64; with little damping neither is in float32."""
    statistics = Streams(kind, *case).statistics
    for streams in ("xx", "tx") if "t" in statistics.streams else ("xx",):
        for damping, most in ((0.01, 1e-5), (1e-8, 1e-6)):
            left, right = statistics.product(f"{streams[0]}y"), statistics.product(f"y{streams[1]}")
            wanted = statistics.product(streams) - right_divide(left, statistics.product("yy"), damping) @ right
            apart = (remainder(statistics, streams, damping) - wanted).norm()
            # Of the textbook's form the rounding is of the size of the products that cancel.
            assert float(apart) <= most * float(wanted.norm()) + 1e-11 * float(statistics.gram.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_regresses_as_well_as_float64(
    kind: str, case: tuple[int | None, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update-LR with the usual damping: the loss on the tokens, and that of a branch that is solved for in float64."""
    streams = Streams(kind, *case)
    weight, codes = streams.weight.double(), streams.codes.double()
    found = streams.loss(updated_branch(LRC(), weight, codes, streams.statistics, 10, torch.float64))
    monkeypatch.setattr(lrc, "solving_dtype", lambda width, damping: torch.float64)
    wide = streams.loss(updated_branch(LRC(), weight, codes, streams.statistics, 10, torch.float64))
    assert found == pytest.approx(wide, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_regressed_target_is_the_best_dense_matrix_and_no_larger_than_what_it_aims_at(
    kind: str, case: tuple[int | None, float]
) -> None:
    """Least squares over the tokens; and its fit has at most the energy of its target."""
    streams = Streams(kind, *case)
    matrix = regressed(streams.weight.double(), streams.statistics, None, share=1.0, damping=NEGLIGIBLE)
    wanted, inputs = streams.t.double() @ streams.weight.double().T, streams.y.double()
    best = inputs @ torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    fitted = inputs @ matrix.T
    unit = streams.unit()
    assert float((wanted - fitted).square().sum() - (wanted - best).square().sum()) / unit < 1e-6
    assert float(fitted.square().sum()) / unit <= 1 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_update_lr_on_inputs_that_lose_nothing_is_whitened_svd(kind: str) -> None:
    streams = Streams(kind, None, 0.0)
    options = LRC(damping=0.01)
    weight, codes = streams.weight.double(), streams.codes.double()
    joint = updated_branch(options, weight, codes, streams.statistics, 10, torch.float64)
    alone = SVD(rank=CountRank(count=10), damping=0.01).fit(
        streams.weight - streams.codes, streams.statistics, dtype=torch.float64
    )
    assert alone.low_rank is not None
    torch.testing.assert_close(joint.up @ joint.down, alone.low_rank.up @ alone.low_rank.down, rtol=1e-6, atol=1e-9)


def test_where_calibration_saw_nothing_codes_and_branch_stay_at_the_weight() -> None:
    streams = Streams("dead channels", 4, 0.0)
    weight, codes = streams.weight.double(), streams.codes.double()
    branch = updated_branch(LRC(), weight, codes, streams.statistics, 40, torch.float64)
    dead = streams.statistics.gram.diagonal() == 0
    assert bool(dead.any())
    torch.testing.assert_close((codes + branch.up @ branch.down)[:, dead], weight[:, dead])


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_wins_only_where_no_branch_takes_as_much_off_the_rounding(
    kind: str, case: tuple[int | None, float]
) -> None:
    """What either takes off, from the tokens: of the second, the leading squared singular values."""
    streams = Streams(kind, *case)
    weight, rounding = streams.weight.double(), (streams.weight - streams.codes).double()
    lost, seen = (streams.x - streams.y).double(), streams.y.double()
    for rank in (2, 10):
        start = initial_branch(weight, streams.statistics, CountRank(count=rank), 0.01, torch.float64)
        gain = (lost @ weight.T).square().sum() - (lost @ (weight - start.product(torch.float64)).T).square().sum()
        most = torch.linalg.svdvals(seen @ rounding.T)[:rank].square().sum()
        if start_wins(weight, rounding, start, streams.statistics):
            assert gain >= most * (1 - 1e-4)
