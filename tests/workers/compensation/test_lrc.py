"""LRC's three closed forms against descent by brute force, its objective against the tokens themselves, option by option."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.compensation.lrc import LRCResult, initial_branch, lrc, updated_branch
from counterweight.workers.compensation.objective import energy, squared_error
from counterweight.workers.compensation.regression import stored
from counterweight.workers.methods.compensations import LRC
from counterweight.workers.methods.compensations.rank import CountRank, EnergyRank, FractionRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ, RTN, Quantizer
from counterweight.workers.methods.weights import Weights

A4 = ActivationFormat(bits=4)
RANK = CountRank(count=4)
ROWS, COLUMNS, TOKENS = 20, 24, 600
TINY = 1e-9  # damping that does not matter


class Problem:
    """A layer, its original input t, its input here x, and y = Q(x); rows are tokens."""

    def __init__(self, *, noise: float = 0.0, seed: int = 0, quantized: bool = True) -> None:
        source = torch.Generator().manual_seed(seed)
        mixing = torch.randn(COLUMNS, COLUMNS, generator=source) * torch.logspace(0.5, -0.5, COLUMNS).unsqueeze(1)
        self.t = torch.randn(TOKENS, COLUMNS, generator=source) @ mixing
        self.x = self.t + noise * torch.randn(TOKENS, COLUMNS, generator=source)
        self.y = fake_quantize_activations(self.x, A4) if quantized else self.x
        self.weight = torch.randn(ROWS, COLUMNS, generator=source)
        gathering = Gathering(activations=A4 if quantized else None)
        accumulator = Accumulator(COLUMNS, gathering=gathering)
        accumulator.add(ShardMoments.of(self.x, gathering, self.t if noise else None))
        self.statistics: InputStatistics = accumulator.result()

    def loss(self, codes: Tensor, branch: Tensor) -> float:
        """||W t - Q y - L x||^2 / ||W t||^2 from the tokens, in float64."""
        weight, t, x, y = (value.double() for value in (self.weight, self.t, self.x, self.y))
        exact = t @ weight.T
        left = exact - y @ codes.double().T - x @ branch.double().T
        return float(left.square().sum() / exact.square().sum())

    def solve(self, quantizer: Quantizer | None = None, **options: object) -> LRCResult:
        (found,) = lrc(
            LRC.model_validate({"rank": RANK, **options}),
            Weights(bits=3, quantizer=quantizer or GPTQ()),
            [(self.weight, self.statistics)],
            scale_dtype=torch.float32,
            factor_dtype=torch.float32,
        )
        return found


def dense(branch: LowRank) -> Tensor:
    return branch.up.double() @ branch.down.double()


@pytest.fixture(params=[0.0, 0.3], ids=["original inputs", "propagated inputs"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(noise=request.param)


def test_the_objective_is_that_of_the_tokens(problem: Problem) -> None:
    source = torch.Generator().manual_seed(3)
    codes = problem.weight + 0.1 * torch.randn(ROWS, COLUMNS, generator=source)
    branch = LowRank(up=torch.randn(ROWS, 2, generator=source), down=0.1 * torch.randn(2, COLUMNS, generator=source))
    for low_rank, product in ((branch, dense(branch)), (None, torch.zeros(ROWS, COLUMNS))):
        error = squared_error(problem.weight.double(), codes.double(), low_rank, problem.statistics)
        found = error / energy(problem.weight.double(), problem.statistics)
        assert found == pytest.approx(problem.loss(codes, product), rel=1e-5)


def test_update_quant_aims_at_the_best_dense_matrix(problem: Problem) -> None:
    """What least squares over the tokens finds, for a branch that stands beside it."""
    branch = initial_branch(problem.weight.double(), problem.statistics, RANK, TINY, torch.float64)
    target = GPTQ(target="regressed", damping=TINY).aim(problem.weight, problem.statistics, dense(branch))
    wanted = problem.t.double() @ problem.weight.double().T - problem.x.double() @ dense(branch).T
    expected = torch.linalg.lstsq(problem.y.double(), wanted).solution.T
    assert torch.allclose(target.double(), expected, atol=1e-3, rtol=1e-3)


def test_targets_are_plain_regressed_or_between(problem: Problem) -> None:
    plain, regressed, mixed = (
        GPTQ(target=target).aim(problem.weight, problem.statistics) for target in ("plain", "regressed", "mixed")
    )
    assert torch.equal(plain, problem.weight)
    assert not torch.allclose(plain, regressed, atol=1e-3)
    assert torch.allclose(mixed, (plain + regressed) / 2, atol=1e-5)
    third = GPTQ(target="mixed", mix=0.25).aim(problem.weight, problem.statistics)
    assert torch.allclose(third, 0.75 * plain + 0.25 * regressed, atol=1e-5)
    assert torch.equal(RTN().aim(problem.weight, problem.statistics), problem.weight)


def test_targets_agree_where_nothing_is_lost() -> None:
    exact = Problem(quantized=False)
    regressed = GPTQ(target="regressed", damping=TINY).aim(exact.weight, exact.statistics)
    assert torch.allclose(regressed, exact.weight, atol=1e-4)


def descended(problem: Problem, start: LowRank, codes: Tensor | None, steps: int = 3000) -> float:
    """The least loss that gradient descent finds over the branch, and over dense codes too when `codes` is None."""
    weight, t, x, y = (value.double() for value in (problem.weight, problem.t, problem.x, problem.y))
    up = torch.randn(start.up.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    down = torch.zeros(start.down.shape, dtype=torch.float64).requires_grad_()
    exact = t @ weight.T
    if codes is None:
        # The best dense codes for any branch are known, so only the rest of t and x is left to the branch.
        project = torch.linalg.lstsq(y, torch.cat((exact, x), dim=1)).solution
        rest = torch.cat((exact, x), dim=1) - y @ project
        exact_left, seen = rest[:, :ROWS], rest[:, ROWS:]
    else:
        exact_left, seen = exact - y @ codes.double().T, x
    scale = exact.square().sum()
    optimizer = torch.optim.LBFGS([up, down], lr=1, max_iter=steps, tolerance_grad=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (exact_left - seen @ down.T @ up.T).square().sum() / scale
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


def test_update_lr_is_the_best_branch_for_its_codes(problem: Problem) -> None:
    codes = (problem.weight * 2).round() / 2
    branch = updated_branch(
        LRC(damping=TINY), problem.weight.double(), codes.double(), problem.statistics, 4, torch.float64
    )
    found = problem.loss(codes, dense(branch))
    assert found == pytest.approx(descended(problem, branch, codes), rel=1e-3)


def test_init_is_the_best_branch_beside_any_dense_matrix(problem: Problem) -> None:
    branch = initial_branch(problem.weight.double(), problem.statistics, RANK, TINY, torch.float64)
    beside = GPTQ(target="regressed", damping=TINY).aim(problem.weight.double(), problem.statistics, dense(branch))
    found = problem.loss(beside, dense(branch))
    assert found == pytest.approx(descended(problem, branch, None), rel=1e-3)


@pytest.mark.parametrize("iterations", [1, 4])
def test_the_objective_never_rises_at_update_lr(problem: Problem, iterations: int) -> None:
    options, weights = LRC(rank=RANK, damping=1e-6), Weights(bits=3)
    weight, statistics = problem.weight.double(), problem.statistics
    metric = InputStatistics(gram=statistics.product("yy"), tokens=TOKENS)
    branch = initial_branch(weight, statistics, RANK, options.damping, torch.float32)
    for _ in range(iterations):
        target = weights.target(weight, statistics, branch.product(torch.float64)).float()
        codes = weights.quantize(target, metric, scale_dtype=torch.float32).weight.dequantize()
        before = problem.loss(codes, dense(branch))
        branch = updated_branch(options, weight, codes.double(), statistics, branch.rank, torch.float32)
        assert problem.loss(codes, dense(branch)) <= before * (1 + 1e-6)
    solved = problem.solve(iterations=iterations, damping=1e-6)
    assert torch.equal(solved.weight.dequantize(), codes)
    assert torch.equal(solved.low_rank.product(), branch.product())


def test_the_objective_never_rises_at_update_quant_solved_exactly(problem: Problem) -> None:
    """Without the grid, Update-Quant is `aimed`; alternating with Update-LR can only go down."""
    weight, quantizer = problem.weight.double(), GPTQ(target="regressed", damping=TINY)
    branch = updated_branch(LRC(damping=TINY), weight, weight * 0.9, problem.statistics, 4, torch.float64)
    codes, losses = weight * 0.9, []
    for _ in range(4):
        losses.append(problem.loss(codes, dense(branch)))
        codes = quantizer.aim(weight, problem.statistics, dense(branch))
        losses.append(problem.loss(codes, dense(branch)))
        branch = updated_branch(LRC(damping=TINY), weight, codes, problem.statistics, 4, torch.float64)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))


def test_beats_the_branch_that_is_fitted_to_what_is_left() -> None:
    """LRC < whitened SVD of the same codes' error < no branch, where inputs are quantized."""
    from counterweight.workers.methods.compensations import SVD

    problem = Problem()
    metric = InputStatistics(gram=problem.statistics.product("yy"), tokens=TOKENS)
    codes = GPTQ().quantize(problem.weight, metric, WeightFormat(bits=3), scale_dtype=torch.float32).weight.dequantize()
    after = SVD(rank=RANK).fit(problem.weight - codes, problem.statistics, dtype=torch.float32).low_rank
    assert after is not None
    solved = problem.solve()
    joint = problem.loss(solved.weight.dequantize(), dense(solved.low_rank))
    assert joint < 0.9 * problem.loss(codes, dense(after))
    assert problem.loss(codes, dense(after)) < problem.loss(codes, torch.zeros(ROWS, COLUMNS))


def test_codes_make_up_for_what_rounding_the_factors_loses() -> None:
    """Factors of 4 bits: Init-LRC's, rounded, with codes behind them, lose less than any that are rounded after the codes."""
    problem = Problem()
    found = {refit: problem.solve(refit=refit, factor_bits=4) for refit in ("none", "joint", "weight")}
    kept = found["none"].low_rank
    start = initial_branch(problem.weight.double(), problem.statistics, RANK, LRC().damping, torch.float32)
    assert torch.equal(kept.product(), stored(start, 4).product())
    assert kept.code_bits == 4
    losses = {refit: problem.loss(one.weight.dequantize(), one.low_rank.product()) for refit, one in found.items()}
    assert losses["none"] < 0.8 * min(losses["joint"], losses["weight"])
    rounded_last = problem.loss(problem.solve(refit="none").weight.dequantize(), kept.product())
    assert losses["none"] < 0.8 * rounded_last


def test_a_branch_that_stays_is_not_iterated() -> None:
    with pytest.raises(ValidationError, match="iterations: 2: expected 1 with refit: none"):
        LRC(refit="none", iterations=2)


def test_every_option_has_a_say() -> None:
    problem = Problem(noise=0.3)
    base = problem.solve()
    for options in (
        {"iterations": 3},
        {"damping": 0.3},
        {"refit": "weight"},
        {"rank": {"count": 7}},
        {"factor_bits": 8},
        {"factor_bits": 4},
        {"refit": "none"},
    ):
        other = problem.solve(**options)
        assert not torch.equal(other.low_rank.product(), base.low_rank.product()), options
    for target in ("regressed", "mixed"):
        assert not torch.equal(problem.solve(GPTQ(target=target)).weight.codes, base.weight.codes)


@pytest.mark.parametrize(("rank", "expected"), [(FractionRank(fraction=0.25), 5), (EnergyRank(energy=1.0), 20)])
def test_ranks_of_every_kind(rank: object, expected: int) -> None:
    assert Problem().solve(rank=rank).low_rank.rank == expected


def test_a_layer_that_saw_no_token_still_gets_codes_and_a_branch() -> None:
    problem = Problem()
    nothing = InputStatistics(gram=torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64), tokens=0)
    (found,) = lrc(
        LRC(rank=RANK),
        Weights(bits=8),
        [(problem.weight, nothing)],
        scale_dtype=torch.float32,
        factor_dtype=torch.float32,
    )
    assert [fallback.step for fallback in found.fallbacks] == ["gptq.tokens"]
    whole = found.weight.dequantize().double() + dense(found.low_rank)
    assert (whole - problem.weight).abs().max() < 0.05 * problem.weight.abs().max()
