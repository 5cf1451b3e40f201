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
from counterweight.workers.compensation.lrc import PROBES, initial_branch, start_wins, updated_branch
from counterweight.workers.compensation.objective import squared_error
from counterweight.workers.compensation.regressed import Regressed
from counterweight.workers.compensation.regression import factors, spectrum
from counterweight.workers.compensation.symmetric import symmetric_product
from counterweight.workers.methods.compensations import LRC
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
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
    monkeypatch.setattr(lrc, "_step", lambda *arguments: None)
    assert torch.equal(case.updated().product(), searched.product())


@pytest.mark.parametrize("refit", ["joint", "weight"])
@pytest.mark.parametrize("moved", [0.0, 0.2])
def test_a_step_computes_what_is_planned(refit: str, moved: float) -> None:
    case = Case("white", 4, moved)
    planned = LRC.model_validate({"refit": refit})._refit_flops(ROWS, WIDTH, original=moved > 0)
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
