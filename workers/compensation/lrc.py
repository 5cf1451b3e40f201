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
from counterweight.workers.compensation.objective import squared_error
from counterweight.workers.compensation.regression import directions, factors, root_of, stored
from counterweight.workers.methods.compensations import LRC, SVD
from counterweight.workers.methods.compensations.rank import CountRank, Rank
from counterweight.workers.methods.weights.stored import StoredWeights
from counterweight.workers.quantization.inputs import checked_matrix, checked_statistics, one_batch
from counterweight.workers.quantization.result import Fallback, QuantizationResult
from counterweight.workers.quantization.target import damped, right_divide, solving_dtype


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
) -> list[LRCResult]:
    """Codes and branch of each of `layers`: weights [out, in], of one shape, with statistics of their inputs. Gram matrices are
    factorized in float64 and, where their damping allows it, solved with in float32 (`solving_dtype`). Whenever a layer needs
    codes, those of all are chosen in one batch, of each those that it gets alone. Raises ValueError as `weights` does, and for
    a rank that a layer is too small for. A layer that saw no token gets plain SVD of what its rounding left."""
    metrics = [InputStatistics(gram=seen.product("yy"), tokens=seen.tokens) for _, seen in layers]
    fits = [_fit(options, weights, *layer, factor_dtype) for layer in layers]
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
    return [results[place] for place in range(len(layers))]


def _fit(
    options: LRC, weights: StoredWeights, weight: Tensor, statistics: InputStatistics, dtype: torch.dtype
) -> Generator[Tensor, QuantizationResult, LRCResult]:
    """Of one layer: yields a target [out, in] float32 whenever it needs codes, and is sent them."""
    matrix = checked_matrix("weight", weight).double()
    checked_statistics(statistics, matrix.shape[1])
    start = initial_branch(matrix, statistics, options.rank, options.damping, dtype)
    branch = start if options.refits else stored(start, options.factor_bits)
    for _ in range(options.iterations):
        solved = yield weights.target(matrix, statistics, branch.product(torch.float64)).float()
        codes = solved.weight.dequantize().double()
        rounding = matrix - branch.product(torch.float64) - codes
        if options.refits:
            branch = updated_branch(options, matrix, codes, statistics, branch.rank, dtype)
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
    the r largest add up to at most sum s and, by Cauchy-Schwarz, to sqrt(r sum s^2)."""
    crossed = statistics.product("xy")
    lost = statistics.product("xx") - crossed - crossed.T + statistics.product("yy")
    up, down = start.factors(torch.float64)
    # tr(W D W^T) - tr((W - L) D (W - L)^T), by way of the small factor.
    read = down @ lost
    gain: float = 2 * float(((read @ weight.T).T * up).sum()) - float(((read @ down.T) * (up.T @ up)).sum())
    # A bound does with float32.
    single = rounding.float()
    squares = single @ statistics.product("yy").float() @ single.T
    most: float = min(float(squares.trace()), start.rank**0.5 * float(squares.norm()))
    return gain >= most


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
    weight: Tensor, statistics: InputStatistics, rank: Rank, damping: float, dtype: torch.dtype
) -> LowRank:
    """Init-LRC for `weight` [out, in] float64; `rank` by energy counts the singular values of W E[x' x'^T]^(1/2)."""
    matrix, gram = _initial_metric(weight, statistics, damping)
    _, vectors = directions(matrix, gram, rank)
    return factors(vectors, matrix, dtype)


def initial_problem(weight: Tensor, statistics: InputStatistics, damping: float) -> tuple[Tensor, Tensor]:
    """M [out, in] and a root R [in, in] of the metric, whose product's singular vectors are Init-LRC's; float64."""
    matrix, gram = _initial_metric(weight, statistics, damping)
    return matrix, root_of(gram)


def _initial_metric(weight: Tensor, statistics: InputStatistics, damping: float) -> tuple[Tensor, Tensor]:
    """The same M, and the metric itself."""
    if statistics.tokens == 0:
        return weight, torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    unseen = remainder(statistics, "xx", damping)
    matrix = weight
    if "t" in statistics.streams:
        matrix = right_divide(weight @ remainder(statistics, "tx", damping), unseen, damping)
    return matrix, unseen


def remainder(statistics: InputStatistics, streams: str, damping: float) -> Tensor:
    """Sum over tokens of a' b'^T for two streams a and b less what a damped y predicts linearly of them: the Schur
    complement, [in, in] float64. Semidefinite when a is b; of a recipe that is weight-only nothing but the damping is left.

    With a = y + e, b = y + f and d the damping it is

        e f^T + d - (e y^T - d) (y y^T + d)^-1 (y f^T - d),

    whose second term is of the size of the result, not of the Gram matrices: float32 is enough for it.
    """
    first, second = streams[0], streams[1]
    yy = statistics.product("yy")
    added = damping * yy.diagonal().mean()

    def beside(stream: str) -> Tensor:
        """y f^T - d."""
        found = statistics.product(f"y{stream}") - yy
        found.diagonal().sub_(added)
        return found

    right = beside(second)
    left = right if first == second else beside(first)
    predicted = _through_inverse(left, right, damped(yy, damping), solving_dtype(len(yy), damping))
    noise = statistics.product(streams) - statistics.product(f"{first}y")
    noise.sub_(statistics.product(f"y{second}")).add_(yy).diagonal().add_(added)
    return noise.sub_(predicted)


def _through_inverse(left: Tensor, right: Tensor, regular: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T regular^-1 right, factorized in float64 and solved in `dtype`; symmetric where left is right."""
    root, failed = torch.linalg.cholesky_ex(regular)
    if int(failed):
        inverse: Tensor = torch.linalg.pinv(regular, hermitian=True)
        return left.T @ (inverse @ right)
    root = root.to(dtype)
    solved = torch.linalg.solve_triangular(root, right.to(dtype), upper=False)
    other = solved if left is right else torch.linalg.solve_triangular(root, left.to(dtype), upper=False)
    found: Tensor = other.T @ solved
    return found


def updated_branch(
    options: LRC, weight: Tensor, codes: Tensor, statistics: InputStatistics, rank: int, dtype: torch.dtype
) -> LowRank:
    """Update-LR: the branch of `rank` for what `codes` [out, in] leave of `weight` [out, in], both float64.

    What regression adds to W - Q is damped, not W itself: on inputs that lose nothing this is whitened SVD, and in directions
    that calibration did not see, codes and branch together stay at the weight.
    """
    matrix, gram = weight - codes, statistics.product("xx")
    if options.refit == "joint" and statistics.tokens:
        dtype_solved = solving_dtype(len(gram), options.damping)
        moved = codes.to(dtype_solved) @ (gram - statistics.product("yx")).to(dtype_solved)
        if "t" in statistics.streams:
            moved += weight.to(dtype_solved) @ (statistics.product("tx") - gram).to(dtype_solved)
        matrix = matrix + right_divide(moved, gram, options.damping)
    metric = damped(gram, options.damping) if statistics.tokens else torch.eye(len(gram)).to(gram)
    _, vectors = directions(matrix, metric, CountRank(count=rank))
    return factors(vectors, matrix, dtype)
