"""What `branches.py` compares: ways to spend a number of bits beside a weight's codes, as the literature has them.

W: a weight [out, in]; x, y: its input, as it is and quantized; xx, xy, yy: their sums of products over the tokens. Recipes of
the product are called, everything else is a trial and has its mathematics here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.lrc import initial_problem, lrc, updated_branch
from counterweight.workers.compensation.objective import energy, squared_error
from counterweight.workers.compensation.regression import factors, root_of, spectrum, stored
from counterweight.workers.methods.compensations import LRC, SVD
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.methods.scales import MeanSquare
from counterweight.workers.methods.weights import Weights
from counterweight.workers.quantization.target import right_divide

W4 = Weights(bits=4)
FactorBits = Literal[4, 8, 16]
STORED = torch.bfloat16
TINY = 1e-9
"""Damping of regressions on few directions, which are far from singular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """What becomes of a linear. dense [out, in] float32 multiplies the quantized input, the branch the unquantized one. bits:
    that all of it takes."""

    dense: Tensor
    branch: LowRank | None
    bits: int

    @classmethod
    def of(cls, codes: StoredWeight, branch: LowRank | None) -> Replacement:
        bits = codes.code_bits + codes.scale_bits + (0 if branch is None else branch.bits)
        return cls(dense=codes.dequantize(), branch=branch, bits=bits)

    def error(self, weight: Tensor, statistics: InputStatistics) -> float:
        """E||W x - dense y - branch x||^2 / E||W x||^2."""
        left = squared_error(weight.double(), self.dense.double(), self.branch, statistics)
        return left / energy(weight.double(), statistics)


Method = Callable[[Tensor, InputStatistics, int], Replacement]
"""Of a weight [out, in] float32, the statistics of its input, and the bits for what stands beside its codes."""


def direction_bits(rows: int, columns: int, bits: FactorBits) -> int:
    """Of one rank of a branch; integer factors have two steps of 32 bits."""
    return (rows + columns) * bits + (64 if bits < 16 else 0)


def affordable(weight: Tensor, budget: int, bits: FactorBits) -> int:
    """The rank of a branch that takes at most `budget` bits; ValueError where that is none."""
    rows, columns = weight.shape
    if (rank := budget // direction_bits(rows, columns, bits)) == 0:
        raise ValueError(
            f"budget: {budget} bits: expected {direction_bits(rows, columns, bits)} for one rank of {bits} bits"
        )
    return min(rows, columns, rank)


def quantized(target: Tensor, metric: Tensor, tokens: int, weights: Weights = W4) -> StoredWeight:
    """Codes of `target` [out, in] in the `metric` [in, in], a sum over the tokens."""
    moments = InputStatistics(gram=metric, tokens=tokens)
    return weights.quantize(target.float(), moments, scale_dtype=STORED).weight


def kept(branch: LowRank, bits: FactorBits) -> LowRank:
    """As it is stored."""
    return branch if bits == 16 else stored(branch, bits)


def leading(matrix: Tensor, root: Tensor, rank: int) -> LowRank:
    """The best branch of `rank` for `matrix` [out, in] float64 in the metric root root^T (Eckart-Young)."""
    return factors(spectrum(matrix @ root)[1][:, :rank], matrix, STORED)


def lost(statistics: InputStatistics) -> Tensor:
    """E (x - y)(x - y)^T, [in, in], a sum over the tokens."""
    crossed = statistics.product("xy")
    return statistics.product("xx") - crossed - crossed.T + statistics.product("yy")


# -- bounds ---------------------------------------------------------------------------------------------------------


def no_branch(weight: Tensor, statistics: InputStatistics, budget: int, *, weights: Weights = W4) -> Replacement:
    """Codes alone."""
    del budget
    return Replacement.of(quantized(weight, statistics.product("yy"), statistics.tokens, weights), None)


def exact(weight: Tensor, statistics: InputStatistics, budget: int) -> Replacement:
    """The weight in 16 bits: what quantizing the input does by itself."""
    del statistics, budget
    return Replacement(dense=weight, branch=None, bits=16 * weight.numel())


# -- recipes of the product -----------------------------------------------------------------------------------------


def whitened(
    weight: Tensor, statistics: InputStatistics, budget: int, *, bits: FactorBits, anticipation: float = 0.0
) -> Replacement:
    """QERA-exact behind GPTQ (`workers/compensation/svd.py`). anticipation: how far GPTQ's Hessian is deflated beforehand."""
    rank = CountRank(count=affordable(weight, budget, bits))
    options = SVD(rank=rank, factor_bits=None if bits == 16 else bits, anticipation=anticipation)
    metric = InputStatistics(gram=statistics.product("yy"), tokens=statistics.tokens)
    codes = quantized(weight, options.foresee(metric, len(weight)).product("xx"), statistics.tokens)
    found = options.fit(weight - codes.dequantize(), statistics, dtype=STORED)
    return Replacement.of(codes, found.low_rank)


def corrected(
    weight: Tensor,
    statistics: InputStatistics,
    budget: int,
    *,
    bits: FactorBits,
    last: Literal["branch", "codes"],
    weights: Weights = W4,
) -> Replacement:
    """LRC (`workers/compensation/lrc.py`). last: which of the two is fitted to the other's rounding. weights: what codes of
    fewer than 4 bits save is the branch's."""
    budget += (4 - weights.bits) * weight.numel()
    if budget < direction_bits(len(weight), weight.shape[1], bits):
        return no_branch(weight, statistics, budget, weights=weights)
    options = LRC(
        rank=CountRank(count=affordable(weight, budget, bits)),
        factor_bits=None if bits == 16 else bits,
        refit="joint" if last == "branch" else "none",
    )
    (found,) = lrc(options, weights, [(weight, statistics)], scale_dtype=STORED, factor_dtype=STORED)
    return Replacement.of(found.weight, found.low_rank)


# -- trials -----------------------------------------------------------------------------------------------------------


def serq(weight: Tensor, statistics: InputStatistics, budget: int) -> Replacement:
    """SERQ (Park et al. 2026, arXiv 2603.08185): one matrix [out, s] of 4 bits gives back, for the salient channels s of the
    quantized input, what the codes lost. Salient are those where the codes' error costs most. The matrix is the error's
    regression on them, where the paper takes its columns. Their order costs nothing: the layers before take it in."""
    rows, columns = weight.shape
    gram = statistics.product("yy")
    codes = quantized(weight, gram, statistics.tokens)
    error = (weight - codes.dequantize()).double()
    count = min(columns, (budget - 16 * rows) // (4 * rows))
    salient = (error.square().sum(0) * gram.diagonal()).topk(count).indices
    metric = gram[salient][:, salient]
    second = quantized(right_divide(error @ gram[:, salient], metric, TINY), metric, statistics.tokens)
    dense = codes.dequantize()
    dense[:, salient] += second.dequantize()
    bits = Replacement.of(codes, None).bits + Replacement.of(second, None).bits
    return Replacement(dense=dense, branch=None, bits=bits)


def unquantized_channels(weight: Tensor, statistics: InputStatistics, budget: int) -> Replacement:
    """SERQ's matrix on the unquantized input (as QUIK, Ashkboos et al. 2023, has outliers): salient are the channels where
    quantizing the input costs most. The codes are fitted last and make up for its rounding."""
    rows, columns = weight.shape
    count = min(columns, (budget - 16 * rows) // (4 * rows))
    salient = (weight.double().square().sum(0) * lost(statistics).diagonal()).topk(count).indices
    rounding = W4.model_copy(update={"quantizer": RTN(scale=MeanSquare(weighted=False))})
    own = quantized(weight[:, salient], statistics.product("xx")[salient][:, salient], statistics.tokens, rounding)
    branch = LowRank(up=own.dequantize(), down=torch.eye(columns)[salient])
    rest = weight - branch.product()
    codes = quantized(rest, statistics.product("yy"), statistics.tokens)
    bits = Replacement.of(codes, None).bits + Replacement.of(own, None).bits
    return Replacement(dense=codes.dequantize(), branch=branch, bits=bits)


def preserved(
    weight: Tensor,
    statistics: InputStatistics,
    budget: int,
    *,
    bits: FactorBits,
    share: float | None = None,
    of: Literal["input", "lost"] = "input",
) -> Replacement:
    """SRR (2026, arXiv 2602.02001): of r ranks, k preserve the leading directions of W in the metric xx and the codes hold
    the rest; r - k reconstruct what the codes lose. share: k / r; None: by the paper's criterion (`balanced`).

    of: `lost`, with LRC's steps in the place of both: preserved is what sees most of what quantizing the input loses
    (Init-LRC), reconstructed the whole output error (Update-LR).
    """
    matrix, gram, rank = weight.double(), statistics.product("xx"), affordable(weight, budget, bits)
    root = root_of(gram)
    ahead = balanced(matrix, statistics, root, rank) if share is None else round(share * rank)
    parts = []
    if ahead:
        metric = root if of == "input" else initial_problem(matrix, statistics, LRC().damping)[1]
        parts.append(kept(leading(matrix, metric, ahead), bits))
    rest = matrix - sum((part.product(torch.float64) for part in parts), torch.zeros_like(matrix))
    codes = quantized(rest, statistics.product("yy"), statistics.tokens)
    if ahead < rank:
        dense = codes.dequantize().double()
        if of == "input":
            behind = leading(rest - dense, root, rank - ahead)
        else:
            behind = updated_branch(LRC(), rest, dense, statistics, rank - ahead, STORED)
        parts.append(kept(behind, bits))
    return Replacement.of(codes, joined(parts))


def balanced(weight: Tensor, statistics: InputStatistics, root: Tensor, rank: int) -> int:
    """The k with the least product of what k directions leave of W and what rank - k leave of an error, as shares of their
    norms in the metric root root^T. The paper takes a random error, this one that of codes without a branch."""
    codes = quantized(weight, statistics.product("yy"), statistics.tokens)

    def left(matrix: Tensor) -> Tensor:
        squares = spectrum(matrix @ root)[0].square()
        return (1 - squares.cumsum(0)[:rank] / squares.sum()).clamp_min(0).sqrt()

    whole = torch.ones(1, dtype=root.dtype)
    exposed, unrecovered = (torch.cat([whole, left(one)]) for one in (weight, weight - codes.dequantize()))
    return int((exposed * unrecovered.flip(0)).argmin())


def joined(parts: list[LowRank]) -> LowRank:
    """Branches side by side, stored alike."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    return LowRank(
        up=torch.cat([first.up, second.up], dim=1),
        down=torch.cat([first.down, second.down]),
        up_scale=_both(first.up_scale, second.up_scale),
        down_scale=_both(first.down_scale, second.down_scale),
        code_bits=first.code_bits,
    )


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def deflated(
    weight: Tensor,
    statistics: InputStatistics,
    budget: int,
    *,
    bits: FactorBits,
    rank: int | None = None,
    noise: float = 0.1,
) -> Replacement:
    """H-SVDQuant ("Deflating the Hessian", 2026): the branch reads the leading directions D [r, in] of W in the metric xx, the
    codes see a Hessian from which they have been projected out, and the branch then writes what is best behind the codes.

    noise: weight of what quantizing the input adds to the codes' Hessian: the paper has .05 to .25, of a model of that noise;
    here its measured mean squares. rank: None for what the budget affords.
    """
    matrix, gram = weight.double(), statistics.product("xx")
    start = kept(leading(matrix, root_of(gram), affordable(weight, budget, bits) if rank is None else rank), bits)
    down = start.factors(torch.float32)[1]
    reading = down.double()
    writing = right_divide(gram @ reading.T, reading @ gram @ reading.T, TINY)  # [in, r]: of an error, the best branch
    rest = gram - writing @ (reading @ gram)
    metric = rest + noise * lost(statistics).diagonal().diag()
    codes = quantized(right_divide(matrix @ rest, metric, TINY), metric, statistics.tokens)
    up = (matrix - codes.dequantize()) @ writing
    return Replacement.of(codes, kept(LowRank(up=up.to(STORED), down=down.to(STORED)), bits))
