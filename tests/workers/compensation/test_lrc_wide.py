"""Update-LR of a layer that is wide enough for one step from the directions before, against the exact decomposition."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.compensation import lrc
from counterweight.workers.compensation.lrc import PROBES, LRCResult, initial_branch, start_wins, updated_branch
from counterweight.workers.compensation.objective import squared_error
from counterweight.workers.compensation.regressed import Regressed
from counterweight.workers.compensation.regression import factors, spectrum
from counterweight.workers.compensation.symmetric import symmetric_product
from counterweight.workers.compensation.unseen import Unseen
from counterweight.workers.methods.activations import Activations
from counterweight.workers.methods.compensations import LRC
from counterweight.workers.methods.compensations.lrc import through_weight
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.methods.weights import Weights
from counterweight.workers.quantization.target import damped, right_divide
from tests.flop_counter import counted, deviations

ROWS, WIDTH, TOKENS, RANK = 560, 512, 1024, 51
INDEX = torch.arange(1, WIDTH + 1, dtype=torch.float32)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation() -> Tensor:
    return torch.linalg.qr(draw(WIDTH, WIDTH, seed=9)).Q


INPUTS: Mapping[str, Callable[[], Tensor]] = {
    "white": lambda: draw(TOKENS, WIDTH, seed=1),
    "decaying": lambda: draw(TOKENS, WIDTH, seed=1) * INDEX**-0.7 @ rotation(),
    "outliers": lambda: draw(TOKENS, WIDTH, seed=1) * torch.where(INDEX <= 4, 30.0, 1.0),
}


class Case:
    """A layer, and the codes that a branch was made for."""

    def __init__(self, inputs: str, bits: int | None, moved: float = 0.0, refinement: int = 0) -> None:
        x = INPUTS[inputs]()
        gathering = Gathering(activations=None if bits is None else ActivationFormat(bits=bits))
        accumulator = Accumulator(WIDTH, gathering=gathering)
        t = x + moved * x.square().mean().sqrt() * draw(TOKENS, WIDTH, seed=2)
        accumulator.add(ShardMoments.of(x, gathering, t if moved else None))
        self.statistics: InputStatistics = accumulator.result()
        self.weight = draw(ROWS, WIDTH).double() / WIDTH**0.5
        self.before = initial_branch(self.weight, self.statistics, CountRank(count=RANK), 0.01, torch.float32)
        left = (self.weight - self.before.product(torch.float64)).float()
        metric = InputStatistics(gram=self.statistics.product("yy"), tokens=TOKENS)
        stored = (
            GPTQ(refinement=refinement).quantize(left, metric, WeightFormat(bits=4), scale_dtype=torch.float32).weight
        )
        self.codes = stored.dequantize().double()

    def updated(self, **options: object) -> LowRank:
        asked = LRC.model_validate(options)
        return updated_branch(asked, self.weight, self.codes, self.statistics, RANK, torch.float32, before=self.before)

    def exact(self) -> LowRank:
        """By the whole spectrum, in float64."""
        gram = self.statistics.product("xx")
        moved = self.codes @ (gram - self.statistics.product("yx"))
        if "t" in self.statistics.streams:
            moved = moved + self.weight @ (self.statistics.product("tx") - gram)
        matrix = self.weight - self.codes + right_divide(moved, gram, 0.01)
        _, vectors = spectrum(matrix @ torch.linalg.cholesky(damped(gram, 0.01)))
        return factors(vectors[:, :RANK], matrix, torch.float32)

    def loss(self, branch: LowRank) -> float:
        return squared_error(self.weight, self.codes, branch, self.statistics)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("bits", "moved"), [(4, 0.0), (4, 0.2), (8, 0.0), (None, 0.0)])
def test_one_step_loses_no_more_than_the_exact_decomposition(inputs: str, bits: int | None, moved: float) -> None:
    case = Case(inputs, bits, moved)
    found, exact = case.loss(case.updated()), case.loss(case.exact())
    assert found <= exact * (1.002 if inputs == "outliers" else 1.0003)
    # What the branch before leaves is well above: there is something to win.
    assert case.loss(case.before) > 1.02 * exact


@pytest.mark.parametrize(("inputs", "steps"), [("white", 1), ("outliers", 2)])
def test_a_second_step_is_taken_where_others_are_nearly_as_strong(
    inputs: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = Case(inputs, 4), []
    squared = Regressed.squared

    def counting(self: Regressed, block: Tensor) -> Tensor:
        seen.append(block.shape[1])
        return squared(self, block)

    monkeypatch.setattr(Regressed, "squared", counting)
    case.updated()
    assert seen.count(RANK) == steps


def test_a_step_is_taken_where_the_spectrum_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("decaying", 4)
    monkeypatch.delattr(lrc, "directions")
    assert case.updated().rank == RANK


def test_without_a_cholesky_factor_directions_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("decaying", 4)
    searched = updated_branch(LRC(), case.weight, case.codes, case.statistics, RANK, torch.float32)
    monkeypatch.setattr(lrc.Regressor, "of", lambda *arguments, **options: None)
    assert torch.equal(case.updated().product(), searched.product())


@pytest.mark.parametrize("refit", ["joint", "weight"])
@pytest.mark.parametrize("moved", [0.0, 0.2])
def test_a_step_computes_what_is_planned(refit: str, moved: float) -> None:
    case = Case("white", 4, moved)
    method, original = LRC.model_validate({"refit": refit}), moved > 0
    planned = method._refit_flops(ROWS, WIDTH, original=original)
    planned += method._regressor_flops(ROWS, WIDTH, original=original)
    executed = counted(lambda: case.updated(refit=refit))
    assert deviations(planned, executed, exact=0.01, entries=0.15) == {}


@pytest.mark.parametrize("bits", [4, 8])
def test_whether_the_start_wins_is_told_by_a_few_columns(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by all of them."""
    case = Case("decaying", bits)
    rounding = case.weight - case.before.product(torch.float64) - case.codes
    told = start_wins(case.weight, rounding, case.before, case.statistics)
    assert ROWS > PROBES
    monkeypatch.setattr(lrc, "PROBES", ROWS)
    assert told == start_wins(case.weight, rounding, case.before, case.statistics) == (bits == 4)


@pytest.mark.parametrize("size", [1, 130, 300, 1100])
def test_symmetric_products(size: int) -> None:
    left = draw(size, 40).double()
    found = symmetric_product(left, left.T)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, left @ left.T)


WIDE = LRC.model_validate({"rank": {"fraction": 0.1}})


def wide(rows: int, width: int) -> tuple[Tensor, InputStatistics]:
    """A weight and its input's statistics."""
    x = draw(width + 64, width, seed=1) * torch.linspace(0.1, 2, width)
    return draw(rows, width) / width**0.5, InputStatistics.of(x, Gathering(activations=ActivationFormat(bits=4)))


def test_a_weight_of_few_rows_goes_through_the_terms_of_the_metric() -> None:
    """To the same square, and branch; with the work that is planned."""
    weight, statistics = wide(512, 1024)
    matrix = weight.double()
    assert through_weight(512, 1024, WIDE.rank, 0.01)
    _, gram = Unseen(statistics, 0.01).problem(matrix)
    exact = matrix @ gram @ matrix.T
    found = Unseen(statistics, 0.01).square(matrix)
    assert found is not None
    assert float((found - exact).norm()) < 1e-5 * float(exact.norm())
    executed = counted(lambda: initial_branch(matrix, statistics, WIDE.rank, 0.01, torch.float32))
    planned = WIDE._initial_flops(512, 1024, 1088, 1, original=False)
    assert 0.8 * planned.products32 < executed.products32 < 1.01 * planned.products32
    assert 0.9 * planned.factorizations < executed.factorizations < 1.1 * planned.factorizations


def test_without_a_cholesky_factor_the_metric_is_made() -> None:
    """Where no channel had input but zero."""
    nothing = InputStatistics.of(torch.zeros(8, 1024), Gathering(activations=ActivationFormat(bits=4)))
    weight, _ = wide(512, 1024)
    assert Unseen(nothing, 0.01).square(weight.double()) is None
    assert initial_branch(weight.double(), nothing, WIDE.rank, 0.01, torch.float32).rank == 51


@pytest.mark.parametrize(("rows", "width"), [(560, 512), (512, 1024)])
def test_linears_of_one_input_share_what_depends_on_it_alone(rows: int, width: int) -> None:
    """Each has the bits that it has alone, and what is shared is computed once, as planned."""
    (first, statistics), second = wide(rows, width), draw(rows, width, seed=5) / width**0.5
    codes = Weights.model_validate({"bits": 4, "quantizer": {"kind": "rtn"}})
    found: list[LRCResult] = []

    def solve(*weights: Tensor, at_once: int | None = None) -> None:
        layers = [(weight, statistics) for weight in weights]
        dtypes = {"scale_dtype": torch.float32, "factor_dtype": torch.float32}
        found.extend(lrc.lrc(WIDE, codes, layers, **dtypes, at_once=at_once))

    alone = counted(lambda: (solve(first), solve(second)))
    together = counted(lambda: solve(first, second))
    solve(first, second, at_once=1)
    for one, *others in zip(found[:2], found[2:4], found[4:], strict=True):
        for other in others:
            assert torch.equal(one.low_rank.product(), other.low_rank.product())
            assert torch.equal(one.weight.dequantize(), other.weight.dequantize())
    planned = [
        WIDE.solve_flops(codes, rows, width, len(first), count, original=False, activations=Activations(bits=4))
        for count in (1, 2)
    ]
    for kind in ("products32", "products64", "factorizations"):
        saved = 2 * getattr(planned[0], kind) - getattr(planned[1], kind)
        assert getattr(alone, kind) - getattr(together, kind) == pytest.approx(saved, rel=1e-3)
    assert together.factorizations < 0.8 * alone.factorizations
