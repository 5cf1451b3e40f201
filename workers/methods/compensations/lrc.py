"""Low-rank correction on the unquantized input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes, matrix_flops
from counterweight.workers.matrix_flops import (
    NOTHING,
    Work,
    cholesky,
    elementwise,
    product,
    product64,
    right_divide,
    solves_in_single,
    symmetric_product,
    triangular,
)
from counterweight.workers.methods.compensations.branch import Branch
from counterweight.workers.methods.compensations.svd import SVD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.compensation.lrc import LRCResult
    from counterweight.workers.methods.activations import Activations
    from counterweight.workers.methods.compensations.rank import Rank
    from counterweight.workers.methods.weights.stored import StoredWeights

PROBES = 32
"""Random columns by which it is estimated how much a branch can take off what rounding leaves: see `compensation.lrc`."""

WEAKEST = 8
"""Columns by which it is judged whether a step of Update-LR was enough."""


def through_weight(rows: int, columns: int, rank: Rank, damping: float) -> bool:
    """Whether Init-LRC of a weight [rows, columns] whose input is the original's goes through what the weight makes of the
    metric's terms, and not through the metric: where that is less work for one such weight alone."""
    if 2 * rows > columns or not rank.known_ahead or not solves_in_single(columns, damping):
        return False
    most = rank.at_most(rows, columns)
    found = matrix_flops.finds_range(rows, columns, most, metric=True)
    return found and matrix_flops.range_side(rows, columns, most, metric=True) == "left"


class LRC(Branch):
    """Low-rank correction on the unquantized input, fitted jointly with the codes (Scetbon & Hensman 2024).

    The branch first takes the directions of the weight that see most of what quantizing the input loses; the codes follow
    (`weights.quantizer.target` says what they aim at), and the branch is fitted again to what they leave. Where quantizing the
    input loses little, codes that know of no branch and a whitened SVD of their error are kept instead, if their error on the
    calibration tokens is smaller.
    """

    VERSION: ClassVar[int] = 7
    joint: ClassVar[bool] = True

    kind: Literal["lrc"] = "lrc"
    iterations: Annotated[int, Field(strict=True, ge=1, le=20)] = 1
    """How often codes and branch are fitted to each other."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean of E[x^2] (E[y^2] of the quantized input) that is added to each channel's where one stream is regressed
    on another."""
    refit: Literal["joint", "weight", "none"] = "joint"
    """What the branch is fitted to once there are codes. joint: the whole output error, that of the quantized input included
    (Update-LR). weight: the error of the weight alone, as whitened SVD, which regresses on nothing. none: it stays as it
    started, in the factors that are stored, and the codes, fitted last, make up for their rounding: for `factor_bits: 4`."""

    @model_validator(mode="after")
    def _refits_between_iterations(self) -> LRC:
        if self.refit == "none" and self.iterations > 1:
            raise ValueError(
                f"iterations: {self.iterations}: expected 1 with refit: none, where nothing changes after that"
            )
        return self

    @property
    def refits(self) -> bool:
        """Whether the branch is fitted again to what the codes leave."""
        return self.refit != "none"

    @property
    def of_finished_codes(self) -> bool:
        return False

    def gain_problem(self, weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor] | None:
        from counterweight.workers.compensation.lrc import initial_problem

        return initial_problem(weight, statistics, self.damping)

    def solve(
        self,
        weights: StoredWeights,
        layers: Sequence[tuple[Tensor, InputStatistics]],
        *,
        scale_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        at_once: int | None = None,
    ) -> list[LRCResult]:
        from counterweight.workers.compensation.lrc import lrc

        return lrc(self, weights, layers, scale_dtype=scale_dtype, factor_dtype=factor_dtype, at_once=at_once)

    def solve_bytes(
        self, weights: StoredWeights, rows: int, columns: int, tokens: float, batch: int = 1, *, siblings: bool = False
    ) -> int:
        square, entries = matrix_bytes.DOUBLE * columns * columns, matrix_bytes.DOUBLE * rows * columns
        single, rank = matrix_bytes.SINGLE * rows * columns, self.rank.at_most(rows, columns)
        # Codes and what rounding left before, in a further iteration.
        again = entries + rows * columns if self.iterations > 1 else 0
        # Of the input, what its quantization loses: the prediction, the rest, and the same made symmetric; its directions.
        rest = max(matrix_bytes.right_divide(columns, columns), 4 * square)
        known = rank if self.rank.known_ahead else None
        initial = max(rest, square + matrix_bytes.directions(rows, columns, known, tokens))
        # The target: the branch, what it leaves.
        aiming = again + entries + max(entries, weights.target_bytes(rows, columns))
        # What the codes leave: the codes, their rounding and the matrix to be fitted; what is regressed and the sum with that;
        # or its directions, in a metric that is definite.
        regressing = entries + max(matrix_bytes.right_divide(rows, columns), 2 * entries)
        refitting, kept = again + 3 * entries, 0
        if self._steps(rows, columns):
            one = matrix_bytes.SINGLE if solves_in_single(columns, self.damping) else matrix_bytes.DOUBLE
            # Up to two products with what the input is not; the damped metric and its factor, which were float64; with them the
            # matrices that are multiplied by them. Further weights of the input find the former.
            moved = 2 if self.refit == "joint" else 0
            shared = one * (2 + moved) * columns * columns
            refitting += max(3 * square, shared + one * (1 + moved) * rows * columns)
            kept = shared * siblings
        else:
            refitting += max(regressing, square + matrix_bytes.directions(rows, columns, rank, columns))
        # Whether plain codes can win: what quantizing the input loses, and the metric and the rounding; float32.
        deciding = entries + matrix_bytes.SINGLE * (2 * columns**2 + rows * columns + rows * min(PROBES, rows))
        # Behind plain codes; then both branches' products and errors.
        plain = single + self._behind.fit_bytes(rows, columns, tokens)
        # In turn; meanwhile the others wait with their weights, and their targets or codes.
        after = kept + max(aiming, deciding, plain, 5 * entries)
        alone = entries + max(initial, refitting, after) + (batch - 1) * (again + single)
        # Together: the targets, and the same put together.
        both = single * batch if batch > 1 else 0
        quantizing = kept + batch * (again + single) + max(both, weights.quantize_bytes(rows, columns, batch))
        return (batch - 1) * entries + max(alone, entries + quantizing)

    def gain_flops(self, rows: int, columns: int, tokens: float, *, original: bool) -> Work:
        root = matrix_flops.root(columns, definite=tokens >= columns)
        return self._metric_flops(columns, original=original) + self._projected(rows, columns, original=original) + root

    def _metric_flops(self, columns: int, *, original: bool) -> Work:
        """Of what a damped y predicts of x, for the metric; with another original input also of what it predicts of that."""
        single = solves_in_single(columns, self.damping)
        solved, around = triangular(columns, columns), cholesky(columns) + elementwise(5 * columns**2)
        symmetric = symmetric_product(columns, columns)
        if not single:
            symmetric = replace(symmetric, products32=0, products64=symmetric.products32)
        seen = around + solved + symmetric
        if not original:
            return seen
        # Of two streams: both are solved for. And the factor of the metric.
        crossed = around + solved * 2 + (product if single else product64)(columns, columns, columns)
        return seen + crossed + elementwise(columns**2) + cholesky(columns)

    def _projected(self, rows: int, columns: int, *, original: bool) -> Work:
        """Of what a weight makes of another original input, regressed."""
        return product64(rows, columns, columns) + matrix_flops.solve(columns, rows) if original else NOTHING

    def _initial_flops(self, rows: int, columns: int, tokens: float, count: int, *, original: bool) -> Work:
        """Of Init-LRC's directions for `count` weights that share an input."""
        rank = self.rank.at_most(rows, columns)
        known = rank if self.rank.known_ahead else None
        each = matrix_flops.directions(rows, columns, known, definite=tokens >= columns)
        if not original and through_weight(rows, columns, self.rank, self.damping):
            # The first term is in the place of the metric; the second is taken off it.
            each += product(rows, columns, columns) + triangular(columns, rows) + symmetric_product(rows, columns)
            return (each + elementwise(rows**2)) * count + cholesky(columns) + elementwise(4 * columns**2)
        each += self._projected(rows, columns, original=original)
        return each * count + self._metric_flops(columns, original=original)

    def solve_flops(
        self,
        weights: StoredWeights,
        rows: int,
        columns: int,
        tokens: float,
        count: int = 1,
        *,
        original: bool,
        activations: Activations | None,
    ) -> Work:
        entries, square, rank = rows * columns, columns**2, self.rank.at_most(rows, columns)
        projected = product64(rank, rows, columns)
        # Beside the branch, which is multiplied out for the target and for what rounding leaves.
        codes = weights.target_flops(rows, columns, branch=True) + weights.quantize_flops(rows, columns)
        codes += product(rows, rank, columns) * 2 + elementwise(4 * entries)
        refit = self._refit_flops(rows, columns, original=original) if self.refits else NOTHING
        regressor = self._regressor_flops(rows, columns, original=original) if self.refits else NOTHING
        # The check of the Gram matrix and the one of the weight, which its target has too.
        initial = elementwise(square + entries) + projected
        shared = self._initial_flops(rows, columns, tokens, count, original=original) + regressor * self.iterations
        # What the start takes off, through its small factor; and what rounding leaves, of a few columns.
        gain = product(rank, columns, columns) + product(rank, columns, rows + rank) + product(rank, rows, rank)
        probes = min(PROBES, rows)
        deciding = gain + product(rows, columns, probes) * 2 + product(columns, columns, probes)
        found = initial + (codes + refit) * self.iterations + deciding + elementwise(3 * square + 5 * entries)
        if activations is not None and activations.bits <= weights.code_bits:
            # Where the input has no more bits than the codes the start is taken to win: in W4 A4 of the reference model it does
            # for 42 linears of 42, in W4 A6 for 3, in W4 A8 for none.
            return found * count + shared
        plain = weights.target_flops(rows, columns) + weights.quantize_flops(rows, columns) + elementwise(2 * entries)
        # Both errors: their terms; in one stream the energy and, with the branch multiplied out, both squares.
        square_error = matrix_flops.square_trace64(rows, columns)
        errors = square_error * 2
        if activations is None and not original:
            errors += square_error + product(rows, rank, columns) + elementwise(2 * entries)
        else:
            streams = 1 + original + (activations is not None)
            errors += product64(rows, columns, columns) + elementwise(2 * entries)
            errors += matrix_flops.branch_terms64(rows, columns, rank, streams)
        return (found + plain + self._behind.fit_flops(rows, columns, tokens) + errors * 2) * count + shared

    def _moved(self, *, original: bool) -> int:
        """Products that Update-LR regresses on x."""
        return (1 + original) if self.refit == "joint" else 0

    def _steps(self, rows: int, columns: int) -> bool:
        """Whether Update-LR takes one step from the directions before."""
        return matrix_flops.finds_range(rows, columns, self.rank.at_most(rows, columns), metric=True)

    def _regressor_flops(self, rows: int, columns: int, *, original: bool) -> Work:
        """Of what the step of Update-LR shares between weights of one input."""
        if not self._steps(rows, columns):
            return NOTHING
        return cholesky(columns) + elementwise(self._moved(original=original) * columns**2)

    def _refit_flops(self, rows: int, columns: int, *, original: bool) -> Work:
        """Of Update-LR, without that."""
        entries, square, rank = rows * columns, columns**2, self.rank.at_most(rows, columns)
        one = product if solves_in_single(columns, self.damping) else product64
        moved = self._moved(original=original)
        if self._steps(rows, columns):
            # Of the directions before, and of a few by which it is judged whether that was enough: what M^T makes of them, the
            # metric of that and M of that. Then M^T of their directions. A second step depends on the data, is the exception
            # (where four channels hold nearly all of an input), and is not counted.
            few = rank + min(WEAKEST, rank)
            plain = one(rows, columns, 2 * few + rank) + one(columns, columns, few)
            regressed = (one(rows, columns, 2 * few + rank) + one(columns, columns, 2 * few + rank)) * moved
            solved = matrix_flops.solve(columns, few + rank) * (moved > 0)
            ends = matrix_flops.qr(rows, rank) + elementwise(rank * (2 * (1 + moved) * (rows + columns) + 3 * rows))
            ends += product64(rank, rows, min(WEAKEST, rank)) * 2
            return elementwise(entries) + plain + regressed + solved + ends
        found = elementwise(moved * square + entries) + product64(rank, rows, columns)
        if moved:
            # What the codes leave: its products with what the input is not, and their regression.
            found += one(rows, columns, columns) * moved + right_divide(rows, columns) + elementwise(moved * entries)
        return found + matrix_flops.directions(rows, columns, rank, definite=True)

    @property
    def _behind(self) -> SVD:
        return SVD(rank=self.rank, factor_bits=self.factor_bits)
