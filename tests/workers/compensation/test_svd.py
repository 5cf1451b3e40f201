"""The low-rank branch against closed forms, against descent from anywhere, and option by option."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.result import CompensationResult
from counterweight.workers.methods.compensations import SVD, AnyCompensation, Compensation, NoCompensation
from counterweight.workers.methods.compensations.rank import CountRank, EnergyRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ

SHAPES = [(24, 40), (40, 24), (32, 32)]


def compensate(
    options: Compensation, residual: Tensor, statistics: InputStatistics | None, *, dtype: torch.dtype
) -> CompensationResult:
    return options.fit(residual, statistics, dtype=dtype)


def anticipate(options: Compensation, statistics: InputStatistics, rows: int) -> InputStatistics:
    return options.foresee(statistics, rows)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(rows: int, columns: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, InputStatistics]:
    """A residual and the statistics of strongly correlated inputs."""
    source = generator(seed)
    mixing = torch.randn(columns, columns, generator=source, dtype=torch.float64)
    mixing *= torch.logspace(1, -1, columns, dtype=torch.float64).unsqueeze(1)
    inputs = torch.randn(tokens, columns, generator=source, dtype=torch.float64) @ mixing
    residual = torch.randn(rows, columns, generator=source)
    return residual, InputStatistics(gram=inputs.T @ inputs, tokens=tokens)


def solve(residual: Tensor, statistics: InputStatistics | None, rank: int = 5, **options: object) -> CompensationResult:
    compensation = SVD.model_validate({"rank": {"count": rank}, **options})
    return compensate(compensation, residual, statistics, dtype=torch.float64)


def product(result: CompensationResult) -> Tensor:
    assert result.low_rank is not None
    return result.low_rank.up.double() @ result.low_rank.down.double()


def loss(error: Tensor, metric: Tensor) -> float:
    return ((error.double() @ metric) * error).sum().item()


def captured(result: CompensationResult, residual: Tensor, metric: Tensor) -> float:
    """Share of the squared residual, in the metric, that the branch as it is stored takes away."""
    assert result.low_rank is not None
    up, down = result.low_rank.factors(torch.float64)
    return 1 - loss(residual - up @ down, metric) / loss(residual, metric)


def whitened(residual: Tensor, metric: Tensor) -> Tensor:
    """Singular values of the residual behind a root of the metric, descending."""
    values, vectors = torch.linalg.eigh(metric)
    return torch.linalg.svdvals(residual.double() @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T)


def metric_of(statistics: InputStatistics, whitening: str) -> Tensor:
    gram = statistics.mean_gram()
    return {"full": gram, "diagonal": gram.diagonal().diag(), "none": torch.eye(len(gram)).double()}[whitening]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("whitening", ["none", "diagonal", "full"])
def test_leaves_the_discarded_singular_values(rows: int, columns: int, whitening: str) -> None:
    residual, statistics = problem(rows, columns)
    result = solve(residual, statistics, rank=5, whitening=whitening)
    metric = metric_of(statistics, whitening)
    expected = whitened(residual, metric)
    left = loss(residual - product(result), metric)
    assert left == pytest.approx(expected[5:].square().sum().item(), rel=1e-8)
    assert result.rank == 5
    assert not result.fallbacks


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_step_away_improves(rows: int, columns: int) -> None:
    residual, statistics = problem(rows, columns)
    branch = solve(residual, statistics).low_rank
    assert branch is not None
    metric = statistics.mean_gram()
    least = loss(residual - branch.up @ branch.down, metric)
    source = generator(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            up = branch.up + size * torch.randn(branch.up.shape, generator=source, dtype=torch.float64)
            down = branch.down + size * torch.randn(branch.down.shape, generator=source, dtype=torch.float64)
            assert loss(residual - up @ down, metric) > least


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_alternating_least_squares_from_anywhere_ends_here(rows: int, columns: int) -> None:
    residual, statistics = problem(rows, columns)
    metric, target = statistics.mean_gram(), residual.double()
    down = torch.randn(5, columns, generator=generator(2), dtype=torch.float64)
    for _ in range(3000):
        up = target @ metric @ down.T @ torch.linalg.inv(down @ metric @ down.T)
        down = torch.linalg.solve(up.T @ up, up.T @ target)
    found = loss(target - up @ down, metric)
    least = loss(target - product(solve(residual, statistics)), metric)
    assert least <= found * (1 + 1e-9)
    assert found == pytest.approx(least, rel=1e-3)


def test_the_more_of_the_metric_the_smaller_the_output_error() -> None:
    metric_errors = {"none": 0.0, "diagonal": 0.0, "full": 0.0}
    for seed in range(5):
        residual, statistics = problem(32, 48, seed=seed)
        statistics = InputStatistics(
            gram=statistics.gram * torch.logspace(-1, 1, 48).outer(torch.logspace(-1, 1, 48)), tokens=statistics.tokens
        )
        errors = {
            whitening: loss(
                residual - product(solve(residual, statistics, whitening=whitening)), statistics.mean_gram()
            )
            for whitening in metric_errors
        }
        assert errors["full"] <= min(errors.values())
        for whitening, value in errors.items():
            metric_errors[whitening] += value
    assert metric_errors["full"] < 0.9 * metric_errors["diagonal"]
    assert metric_errors["diagonal"] < 0.9 * metric_errors["none"]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_captures_more_with_each_rank_and_all_with_the_last(rows: int, columns: int) -> None:
    residual, statistics = problem(rows, columns)
    metric = statistics.mean_gram()
    ranks = range(1, min(rows, columns) + 1)
    shares = [captured(solve(residual, statistics, rank=rank), residual, metric) for rank in ranks]
    assert all(before < after for before, after in pairwise(shares))
    assert shares[-1] == pytest.approx(1, abs=1e-9)
    assert torch.allclose(product(solve(residual, statistics, rank=min(rows, columns))), residual.double(), atol=1e-6)


def test_permuting_channels_permutes_the_branch() -> None:
    residual, statistics = problem(24, 40)
    order = torch.randperm(40, generator=generator(3))
    turned = InputStatistics(gram=statistics.gram[order][:, order], tokens=statistics.tokens)
    straight = product(solve(residual, statistics))
    assert torch.allclose(product(solve(residual[:, order], turned)), straight[:, order], atol=1e-8)
    rows = torch.randperm(24, generator=generator(4))
    assert torch.allclose(product(solve(residual[rows], statistics)), straight[rows], atol=1e-8)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_fewer_tokens_than_channels(rows: int, columns: int) -> None:
    residual, statistics = problem(rows, columns, tokens=6)
    whole = solve(residual, statistics, rank=6)
    metric = statistics.mean_gram()
    assert captured(whole, residual, metric) == pytest.approx(1, abs=1e-9)
    part = solve(residual, statistics, rank=3)
    left = loss(residual - product(part), metric)
    assert left == pytest.approx(whitened(residual, metric)[3:].square().sum().item(), rel=1e-6)
    assert not part.fallbacks


def test_channels_that_were_never_seen_do_no_harm() -> None:
    residual, statistics = problem(24, 40)
    gram = statistics.gram.clone()
    gram[:5], gram[:, :5] = 0, 0
    branch = product(solve(residual, InputStatistics(gram=gram, tokens=10)))
    assert bool(torch.isfinite(branch).all())
    assert branch[:, :5].norm() <= residual[:, :5].norm()


def test_damping_leads_from_the_whitened_to_the_plain_solution() -> None:
    residual, statistics = problem(24, 40)
    metric = statistics.mean_gram()
    plain = product(solve(residual, None, whitening="none"))
    near, far = (product(solve(residual, statistics, damping=value)) for value in (0.0, 1.0))
    assert (far - plain).norm() < 0.9 * (near - plain).norm()
    expected = metric + metric.diagonal().mean() * torch.eye(40)
    assert loss(residual - far, expected) < loss(residual - near, expected)
    diagonal = [product(solve(residual, statistics, damping=value, whitening="diagonal")) for value in (0.0, 1.0)]
    assert not torch.equal(*diagonal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_in_the_stored_dtype_lose_almost_nothing(dtype: torch.dtype) -> None:
    residual, statistics = problem(64, 96)
    stored = compensate(SVD(rank=CountRank(count=8)), residual, statistics, dtype=dtype)
    assert stored.low_rank is not None
    assert stored.low_rank.up.dtype == stored.low_rank.down.dtype == dtype
    assert stored.low_rank.up.is_contiguous()
    assert stored.low_rank.down.is_contiguous()
    exact = solve(residual, statistics, rank=8)
    metric = statistics.mean_gram()
    assert 0 <= captured(exact, residual, metric) - captured(stored, residual, metric) < 1e-4


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_residuals_of_any_size_fit_float16(size: float) -> None:
    residual, statistics = problem(24, 40)
    exact = solve(residual, statistics)
    stored = compensate(SVD(rank=CountRank(count=5)), residual * size, statistics, dtype=torch.float16)
    metric = statistics.mean_gram()
    expected = captured(exact, residual, metric)
    assert captured(stored, residual * size, metric) == pytest.approx(expected, abs=1e-3)


def test_energy_sets_the_rank() -> None:
    residual, statistics = problem(24, 40)
    for energy in (0.3, 0.6, 0.9):
        result = compensate(SVD(rank=EnergyRank(energy=energy)), residual, statistics, dtype=torch.float32)
        values = whitened(residual, statistics.mean_gram())
        share = values.cumsum(0) / values.sum()
        assert share[result.rank - 1] >= energy
        assert result.rank == 1 or share[result.rank - 2] < energy


def test_without_tokens_the_residual_is_not_whitened_and_that_is_said() -> None:
    residual, statistics = problem(24, 40)
    nothing = InputStatistics(gram=torch.zeros_like(statistics.gram), tokens=0)
    for whitening in ("full", "diagonal"):
        result = solve(residual, nothing, whitening=whitening)
        assert [fallback.step for fallback in result.fallbacks] == ["svd.tokens"]
        assert torch.equal(product(result), product(solve(residual, None, whitening="none")))


def test_nothing_to_put_back() -> None:
    _, statistics = problem(24, 40)
    result = solve(torch.zeros(24, 40), statistics)
    assert result.low_rank is None
    assert result.rank == 0
    assert [fallback.step for fallback in result.fallbacks] == ["svd.residual"]


def test_no_compensation_adds_nothing() -> None:
    residual, statistics = problem(24, 40)
    none = NoCompensation()
    result = compensate(none, residual, statistics, dtype=torch.float32)
    assert (result.low_rank, result.rank, result.fallbacks) == (None, 0, ())
    assert anticipate(none, statistics, 24) is statistics
    assert none.problem(1, 1) is None


@pytest.mark.parametrize(
    ("residual", "statistics", "match"),
    [
        (torch.full((4, 8), torch.nan), None, "residual: holds NaN"),
        (torch.ones(8), None, r"residual: float32 \[8\]"),
        (torch.ones(4, 8), None, "statistics: none"),
        (torch.ones(4, 8), InputStatistics(gram=torch.eye(7).double(), tokens=1), "width 7: expected 8"),
        (torch.ones(4, 8), InputStatistics(gram=torch.eye(8).double() / 0, tokens=1), "Gram matrix holds NaN"),
        (torch.ones(4, 8), InputStatistics(gram=torch.eye(8).double(), tokens=1), "rank.count: 5: expected at most 4"),
    ],
)
def test_what_is_refused(residual: Tensor, statistics: InputStatistics | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        solve(residual, statistics)


def test_a_rank_that_does_not_fit_is_known_before_solving() -> None:
    assert SVD(rank=CountRank(count=5)).problem(4, 8) == "rank.count: 5: expected at most 4"
    assert SVD(rank=CountRank(count=4)).problem(4, 8) is None


def test_anticipation_takes_the_leading_directions_from_the_metric() -> None:
    _, statistics = problem(24, 40)
    values = torch.linalg.eigvalsh(statistics.gram)
    assert anticipate(SVD(), statistics, 24) is statistics
    for share in (0.5, 1.0):
        left = anticipate(SVD(rank=CountRank(count=7), anticipation=share), statistics, 24)
        expected = torch.cat([values[:-7], (1 - share) * values[-7:]]).sort().values
        assert torch.allclose(torch.linalg.eigvalsh(left.gram), expected, atol=1e-9 * float(values[-1]))
        assert left.tokens == statistics.tokens


def test_anticipation_pays_with_the_branch_and_costs_without_it() -> None:
    totals: dict[float, list[float]] = {0.0: [0.0, 0.0], 0.9: [0.0, 0.0], 1.0: [0.0, 0.0]}
    for seed in range(3):
        weight, statistics = problem(64, 64, seed=seed)
        metric = statistics.mean_gram()
        for share, sums in totals.items():
            compensation = SVD(rank=CountRank(count=8), anticipation=share)
            foreseen = anticipate(compensation, statistics, 64)
            solved = GPTQ().quantize(weight, foreseen, WeightFormat(), scale_dtype=torch.float32).weight
            residual = weight - solved.dequantize()
            branch = product(compensate(compensation, residual, statistics, dtype=torch.float64))
            sums[0] += loss(residual - branch, metric)
            sums[1] += loss(residual, metric)
    assert totals[1.0][0] < totals[0.9][0] < 0.95 * totals[0.0][0]
    assert totals[1.0][1] > totals[0.9][1] > totals[0.0][1]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "pca"},
        {"kind": "svd", "whitening": "half"},
        {"kind": "svd", "damping": -0.1},
        {"kind": "svd", "damping": 0.1, "whitening": "none"},
        {"kind": "svd", "damping": 0.1, "whitening": "magnitude"},
        {"kind": "svd", "anticipation": 1.5},
        {"kind": "svd", "anticipation": 0.5, "whitening": "none"},
        {"kind": "svd", "anticipation": 0.5, "rank": {"energy": 0.5}},
        {"kind": "none", "rank": {"count": 3}},
    ],
)
def test_compensations_that_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AnyCompensation).validate_python(fields)


def test_a_manifest_names_a_compensation() -> None:
    named = TypeAdapter(AnyCompensation).validate_python({"kind": "svd", "rank": {"count": 32}, "anticipation": 0.9})
    assert named == SVD(rank=CountRank(count=32), anticipation=0.9)
    assert TypeAdapter(AnyCompensation).validate_python({"kind": "none"}) == NoCompensation()


def test_four_bits_of_twice_the_rank_leave_less_than_eight() -> None:
    residual, statistics = problem(64, 96)
    found = [
        compensate(SVD(rank=CountRank(count=rank), factor_bits=bits), residual, statistics, dtype=torch.bfloat16)
        for rank, bits in ((8, 8), (16, 4))
    ]
    eight, four = (captured(result, residual, statistics.mean_gram()) for result in found)
    assert four > eight + 0.05
    assert [result.low_rank.bits for result in found if result.low_rank] == [8 * (160 * 8 + 64), 16 * (160 * 4 + 64)]


@pytest.mark.parametrize("kind", ["svd", "aser"])
def test_factors_in_integer_codes_take_half_the_bytes_and_lose_little(kind: str) -> None:
    residual, statistics = problem(64, 96)
    options = {"kind": kind, "rank": {"count": 8}}
    adapter: TypeAdapter[AnyCompensation] = TypeAdapter(AnyCompensation)
    plain, coded = (
        compensate(
            adapter.validate_python({**options, "factor_bits": bits}), residual, statistics, dtype=torch.bfloat16
        )
        for bits in (None, 8)
    )
    assert plain.low_rank is not None
    assert coded.low_rank is not None
    assert coded.low_rank.up.dtype is torch.int8
    assert coded.low_rank.bits == plain.low_rank.bits / 2 + 2 * 8 * 32  # two float32 steps for each direction
    shares = [captured(result, residual, statistics.mean_gram()) for result in (plain, coded)]
    assert shares[1] == pytest.approx(shares[0], abs=2e-3)
    assert shares[1] != shares[0]
