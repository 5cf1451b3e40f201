"""LRC: a low-rank branch on the unquantized input, fitted jointly with codes that see the quantized one.

Scetbon & Hensman, "Low-Rank Correction for Quantized LLMs" (2024). With t the layer's input in the original model, x its
input here, y = Q(x) what the codes see, and E[. .] over the calibration tokens, the objective is

    min over codes Q and branch L of rank r of    E ||W t - Q y - L x||^2.

1. Init-LRC: were Q free, it would remove all that y can predict linearly. What is left, t' = t - E[t y^T] E[y y^T]^-1 y and x'
   likewise, is the branch's: L = the reduced-rank regression of W t' on x'. Where t = x that takes the leading directions
   of W E[x' x'^T]^(1/2): what quantizing the input lost.
2. Update-Quant: codes for the target of `StoredWeights.target`, in the metric E[y y^T].
3. Update-LR: the reduced-rank regression of W t - Q y on x.

Factors of 4 bits lose more by rounding than Update-LR wins. With `refit: none` Init-LRC's factors are rounded first, and the
codes are fitted to W less the rounded branch, so that they make up for the rounding.

The alternation ends in a local minimum, and Init-LRC spends all ranks on what quantizing the input loses. Where that is less
than what rounding the weight loses (inputs of 8 bits or more), the branch may serve better behind codes that know nothing of
it. So the whitened SVD of plain codes' error is solved too unless `start_wins`, and the smaller objective is kept.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.latest import Latest
from counterweight.workers.compensation.moments import lost
from counterweight.workers.compensation.objective import squared_error
from counterweight.workers.compensation.range_finder import leading_of
from counterweight.workers.compensation.regressed import Regressed, Regressor, differences
from counterweight.workers.compensation.regression import balanced, directions, factors, root_of, stored
from counterweight.workers.compensation.unseen import Unseen
from counterweight.workers.matrix_flops import finds_range
from counterweight.workers.methods.compensations import LRC, SVD
from counterweight.workers.methods.compensations.lrc import PROBES, WEAKEST, through_weight
from counterweight.workers.methods.compensations.rank import CountRank, Rank
from counterweight.workers.methods.weights.stored import StoredWeights
from counterweight.workers.quantization.inputs import checked_matrix, checked_statistics, one_batch
from counterweight.workers.quantization.result import Fallback, QuantizationResult
from counterweight.workers.quantization.target import damped, right_divide, solving_dtype

APART = 3.0
"""By how much a branch's directions must be stronger than the others for one step to be enough: see `_step`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LRCResult:
    """Codes and branch, and departures from the recipe."""

    weight: StoredWeight
    low_rank: LowRank
    fallbacks: tuple[Fallback, ...]


def lrc(
    options: LRC,
    weights: StoredWeights,
    layers: Sequence[tuple[Tensor, InputStatistics]],
    *,
    scale_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    at_once: int | None = None,
) -> list[LRCResult]:
    """Codes and branch of each of `layers`: weights [out, in], of one shape, with statistics of their inputs. Gram matrices are
    factorized in float64 and, where their damping allows it, solved with in float32 (`solving_dtype`). Neighbours with the same
    statistics share what depends on these alone. Whenever layers need codes, those of `at_once` (None: of all) are chosen in
    one batch; each gets what it gets alone. Raises ValueError as `weights` does, and for a rank that a layer is too small for.
    A layer that saw no token gets plain SVD of what its rounding left."""
    unseen = Latest(lambda statistics: Unseen(statistics, options.damping))
    starts = []
    for weight, statistics in layers:
        matrix = checked_matrix("weight", weight).double()
        checked_statistics(statistics, matrix.shape[1])
        starts.append(
            initial_branch(matrix, statistics, options.rank, options.damping, factor_dtype, unseen.of(statistics))
        )
    unseen.drop()
    regressors = Latest(lambda statistics: Regressor.of(statistics, options.damping, joint=options.refit == "joint"))
    last = {id(statistics): place for place, (_, statistics) in enumerate(layers)}
    fits = [
        _fit(options, weights, *layer, start, factor_dtype, regressors, keep=place < last[id(layer[1])])
        for place, (layer, start) in enumerate(zip(layers, starts, strict=True))
    ]
    metrics = [InputStatistics(gram=seen.product("yy"), tokens=seen.tokens) for _, seen in layers]
    step, found = at_once or len(layers), []
    for first in range(0, len(layers), step):
        some = slice(first, first + step)
        found += _together(weights, fits[some], metrics[some], scale_dtype)
    return found


def _together(
    weights: StoredWeights,
    fits: Sequence[Generator[Tensor, QuantizationResult, LRCResult]],
    metrics: Sequence[InputStatistics],
    scale_dtype: torch.dtype,
) -> list[LRCResult]:
    """Results of fits whose codes are chosen in one batch, of each those that it gets alone."""
    results: dict[int, LRCResult] = {}
    targets = {place: next(fit) for place, fit in enumerate(fits)}
    while targets:
        places, asked = list(targets), one_batch(list(targets.values()))
        targets.clear()
        found = weights.quantize_batch(asked, [metrics[place] for place in places], scale_dtype=scale_dtype)
        del asked
        for place, codes in zip(places, found, strict=True):
            try:
                targets[place] = fits[place].send(codes)
            except StopIteration as end:
                results[place] = end.value
    return [results[place] for place in range(len(fits))]


def _fit(
    options: LRC,
    weights: StoredWeights,
    weight: Tensor,
    statistics: InputStatistics,
    start: LowRank,
    dtype: torch.dtype,
    regressors: Latest[Regressor | None],
    *,
    keep: bool,
) -> Generator[Tensor, QuantizationResult, LRCResult]:
    """Of one layer: yields a target [out, in] float32 whenever it needs codes, and is sent them. keep: whether others behind it
    have the same statistics."""
    matrix = weight.double()
    branch = start if options.refits else stored(start, options.factor_bits)
    for _ in range(options.iterations):
        solved = yield weights.target(matrix, statistics, branch.product(torch.float64)).float()
        codes = solved.weight.dequantize().double()
        rounding = matrix - branch.product(torch.float64) - codes
        if options.refits:
            branch = updated_branch(
                options, matrix, codes, statistics, branch.rank, dtype, before=branch, regressors=regressors
            )
            if not keep:
                regressors.drop()
        del codes
    if options.refits:
        branch = stored(branch, options.factor_bits)
    found = LRCResult(weight=solved.weight, low_rank=branch, fallbacks=solved.fallbacks)
    if not statistics.tokens or start_wins(matrix, rounding, start, statistics):
        return found
    del rounding
    plain = yield weights.target(matrix, statistics).float()
    whitened = SVD(rank=CountRank(count=branch.rank), factor_bits=options.factor_bits)
    return _better(matrix, statistics, found, _behind(plain, matrix, statistics, whitened, dtype))


def start_wins(weight: Tensor, rounding: Tensor, start: LowRank, statistics: InputStatistics) -> bool:
    """Whether Init-LRC's branch takes more off what quantizing the input loses, E||W (x - y)||^2, than a branch of its rank
    can take off what rounding leaves, `rounding` [out, in]. Of the latter's squared singular values s in the metric E[y y^T],
    the r largest add up to at most sum s and, by Cauchy-Schwarz, to sqrt(r sum s^2); both sums are estimated from what the
    square makes of `PROBES` random columns (Hutchinson, 1990). All of it in float32."""
    up, down = start.factors(torch.float32)
    # tr(W D W^T) - tr((W - L) D (W - L)^T), by way of the small factor.
    read = down @ lost(statistics, torch.float32)
    gain: float = 2 * float(((read @ weight.float().T).T * up).sum()) - float(((read @ down.T) * (up.T @ up)).sum())
    single, seen = rounding.float(), statistics.product("yy").float()
    probes = _probes(len(single)).to(single.device)
    squares = single @ (seen @ (single.T @ probes))
    most: float = min(float((probes * squares).sum()), start.rank**0.5 * float(squares.norm()))
    return gain >= most


def _probes(rows: int) -> Tensor:
    """Columns z [rows, probes] float32 with E[z z^T] = I / probes, the same for every call; where they are as many as rows,
    those of the identity, with which an estimate is exact."""
    if rows <= PROBES:
        return torch.eye(rows)
    found: Tensor = torch.randint(0, 2, (rows, PROBES), generator=torch.Generator().manual_seed(0)).float()
    return found.mul_(2).sub_(1).div_(PROBES**0.5)


def _behind(
    plain: QuantizationResult, weight: Tensor, statistics: InputStatistics, whitened: SVD, dtype: torch.dtype
) -> LRCResult | None:
    """Codes that know of no branch, with the whitened SVD of their error, its factors in `dtype`; None where they leave
    nothing."""
    residual = (weight - plain.weight.dequantize()).float()
    fitted = whitened.fit(residual, statistics, dtype=dtype)
    if fitted.low_rank is None:
        return None
    return LRCResult(weight=plain.weight, low_rank=fitted.low_rank, fallbacks=plain.fallbacks)


def _better(weight: Tensor, statistics: InputStatistics, first: LRCResult, second: LRCResult | None) -> LRCResult:
    """The one with the smaller objective."""
    if second is None:
        return first

    def objective(found: LRCResult) -> float:
        return squared_error(weight, found.weight.dequantize().double(), found.low_rank, statistics)

    return second if objective(second) < objective(first) else first


def initial_branch(
    weight: Tensor,
    statistics: InputStatistics,
    rank: Rank,
    damping: float,
    dtype: torch.dtype,
    unseen: Unseen | None = None,
) -> LowRank:
    """Init-LRC for `weight` [out, in] float64; `rank` by energy counts the singular values of W E[x' x'^T]^(1/2). unseen: of
    these statistics, where it was made before."""
    seen, (rows, columns) = unseen or Unseen(statistics, damping), weight.shape
    if statistics.tokens and "t" not in statistics.streams and through_weight(rows, columns, rank, damping):
        square = seen.square(weight)
        if square is not None:
            _, vectors = leading_of(square, rank.at_most(rows, columns))
            return factors(vectors, weight, dtype)
    matrix, gram = seen.problem(weight)
    _, vectors = directions(matrix, gram, rank)
    return factors(vectors, matrix, dtype)


def initial_problem(weight: Tensor, statistics: InputStatistics, damping: float) -> tuple[Tensor, Tensor]:
    """M [out, in] and a root R [in, in] of the metric, whose product's singular vectors are Init-LRC's; float64."""
    matrix, gram = Unseen(statistics, damping).problem(weight)
    return matrix, root_of(gram)


def updated_branch(
    options: LRC,
    weight: Tensor,
    codes: Tensor,
    statistics: InputStatistics,
    rank: int,
    dtype: torch.dtype,
    before: LowRank | None = None,
    regressors: Latest[Regressor | None] | None = None,
) -> LowRank:
    """Update-LR: the branch of `rank` for what `codes` [out, in] leave of `weight` [out, in], both float64. before: the branch
    of the same rank that the codes were made for; regressors: of linears that share an input.

    What regression adds to W - Q is damped, not W itself: on inputs that lose nothing this is whitened SVD, and in directions
    that calibration did not see, codes and branch together stay at the weight.
    """
    joint = options.refit == "joint"
    if before is not None and finds_range(*weight.shape, rank, metric=True):
        made = (
            Regressor.of(statistics, options.damping, joint=joint) if regressors is None else regressors.of(statistics)
        )
        if made is not None:
            return _step(weight - codes, [codes, weight], made, before, dtype)
    metric = (
        damped(statistics.product("xx"), options.damping)
        if statistics.tokens
        else torch.eye(weight.shape[1]).to(weight)
    )
    matrix = weight - codes
    if joint and statistics.tokens:
        matrix = matrix + right_divide(
            _moved(weight, codes, statistics, options), statistics.product("xx"), options.damping
        )
    _, vectors = directions(matrix, metric, CountRank(count=rank))
    return factors(vectors, matrix, dtype)


def _moved(weight: Tensor, codes: Tensor, statistics: InputStatistics, options: LRC) -> Tensor:
    """E[(W t - Q y - (W - Q) x) x^T] [out, in], to be regressed on x."""
    dtype = solving_dtype(weight.shape[1], options.damping)
    found, *others = (
        matrix.to(dtype) @ product
        for matrix, product in zip((codes, weight), differences(statistics, dtype), strict=False)
    )
    return sum(others, found)


def _step(rest: Tensor, moved: Sequence[Tensor], by: Regressor, before: LowRank, dtype: torch.dtype) -> LowRank:
    """One step of subspace iteration from the directions of the branch before. moved: what each difference is multiplied by, or
    more.

    The codes were made for that branch and leave it whole, so that in M G M^T its directions are stronger than the next by
    what it carries over what codes lose, most often 5 to 150 times: the loss is within 0.03 % of the exact decomposition's.
    Where a few channels hold nearly all of an input of 4 bits they are 1.3 times as strong, and a second step is taken, with
    which it is 0.12 % (tests/workers/compensation/test_lrc_wide.py).
    """
    solving = by.metric.dtype
    matrix = Regressed(
        rest=rest.to(solving), moved=[one.to(solving) for one, _ in zip(moved, by.differences, strict=False)], by=by
    )
    up, _ = before.factors(solving)
    start = up / up.norm(dim=0).clamp_min(torch.finfo(solving).tiny)
    left, triangle = torch.linalg.qr(matrix.squared(start).double())
    # Of the weakest directions what the step took off, and how strong that is.
    weakest = start[:, -WEAKEST:].double()
    strayed = (weakest - left @ (left.T @ weakest)).to(solving)
    if float(matrix.squared(strayed).norm()) * APART > float(strayed.norm() * triangle.diagonal().abs().min()):
        left = torch.linalg.qr(matrix.squared(left.to(solving)).double()).Q
    return balanced(left, matrix.transposed(left.to(solving)).T.double(), dtype)
