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
    from counterweight.workers.methods.weights.stored import StoredWeights

PROBES = 32
"""Random columns by which it is estimated how much a branch can take off what rounding leaves: see `compensation.lrc`."""

WEAKEST = 8
"""Columns by which it is judged whether a step of Update-LR was enough."""


class LRC(Branch):
    """Low-rank correction on the unquantized input, fitted jointly with the codes (Scetbon & Hensman 2024).

    The branch first takes the directions of the weight that see most of what quantizing the input loses; the codes follow
    (`weights.quantizer.target` says what they aim at), and the branch is fitted again to what they leave. Where quantizing the
    input loses little, codes that know of no branch and a whitened SVD of their error are kept instead, if their error on the
    calibration tokens is smaller.
    """

    VERSION: ClassVar[int] = 6
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
    ) -> list[LRCResult]:
        from counterweight.workers.compensation.lrc import lrc

        return lrc(self, weights, layers, scale_dtype=scale_dtype, factor_dtype=factor_dtype)

    def solve_bytes(self, weights: StoredWeights, rows: int, columns: int, tokens: float, batch: int = 1) -> int:
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
        refitting = again + 3 * entries
        if matrix_flops.finds_range(rows, columns, rank, metric=True):
            refitting += self._step_bytes(rows, columns)
        else:
            refitting += max(regressing, square + matrix_bytes.directions(rows, columns, rank, columns))
        # Whether plain codes can win: what quantizing the input loses, and in float32 the metric and the rounding.
        deciding = entries + 2 * square + max(square, single + matrix_bytes.SINGLE * (columns**2 + rows**2))
        # Behind plain codes; then both branches' products and errors.
        plain = single + self._behind.fit_bytes(rows, columns, tokens)
        # In turn; meanwhile the others wait with their weights, and their targets or codes.
        alone = entries + max(initial, aiming, refitting, deciding, plain, 5 * entries) + (batch - 1) * (again + single)
        # Together: the targets, and the same put together.
        both = single * batch if batch > 1 else 0
        quantizing = batch * (again + single) + max(both, weights.quantize_bytes(rows, columns, batch))
        return (batch - 1) * entries + max(alone, entries + quantizing)

    def _step_bytes(self, rows: int, columns: int) -> int:
        """Of Update-LR by one step, beside the weight, the codes and what they leave in float64."""
        square = matrix_bytes.DOUBLE * columns * columns
        one = matrix_bytes.SINGLE if solves_in_single(columns, self.damping) else matrix_bytes.DOUBLE
        # Up to two products with what the input is not, in float64; the damped metric and its factor; all that in the dtype
        # that is solved in, with the matrices that are multiplied by them.
        moved = 2 if self.refit == "joint" else 0
        return (2 + moved) * square + one * ((2 + moved) * columns * columns + (1 + moved) * rows * columns)

    def gain_flops(self, rows: int, columns: int, tokens: float, *, original: bool) -> Work:
        root = matrix_flops.root(columns, definite=tokens >= columns)
        return self._metric_flops(rows, columns, original=original) + root

    def _metric_flops(self, rows: int, columns: int, *, original: bool) -> Work:
        # What a damped y predicts of x, for the metric; with another original input also what it predicts of that.
        single = solves_in_single(columns, self.damping)
        solved, around = triangular(columns, columns), cholesky(columns) + elementwise(5 * columns**2)
        symmetric = symmetric_product(columns, columns)
        if not single:
            symmetric = replace(symmetric, products32=0, products64=symmetric.products32)
        seen = around + solved + symmetric
        if not original:
            return seen
        # Of two streams: both are solved for.
        crossed = around + solved * 2 + (product if single else product64)(columns, columns, columns)
        both = seen + crossed + elementwise(columns**2)
        return both + product64(rows, columns, columns) + right_divide(rows, columns)

    def solve_flops(
        self,
        weights: StoredWeights,
        rows: int,
        columns: int,
        tokens: float,
        *,
        original: bool,
        activations: Activations | None,
    ) -> Work:
        entries, square, rank = rows * columns, columns**2, self.rank.at_most(rows, columns)
        whitened, projected = product64(rows, columns, columns), product64(rank, rows, columns)
        known = rank if self.rank.known_ahead else None
        # Beside the branch, which is multiplied out for the target and for what rounding leaves.
        codes = weights.target_flops(rows, columns, branch=True) + weights.quantize_flops(rows, columns)
        codes += product(rows, rank, columns) * 2 + elementwise(4 * entries)
        refit = self._refit_flops(rows, columns, original=original) if self.refits else NOTHING
        # The check of the Gram matrix and the one of the weight, which its target has too.
        checks = elementwise(square + entries)
        initial = checks + self._metric_flops(rows, columns, original=original) + projected
        initial += matrix_flops.directions(rows, columns, known, definite=tokens >= columns)
        # What the start takes off, through its small factor; and what rounding leaves, of a few columns.
        gain = product(rank, columns, columns) + product(rank, columns, rows + rank) + product(rank, rows, rank)
        probes = min(PROBES, rows)
        deciding = gain + product(rows, columns, probes) * 2 + product(columns, columns, probes)
        found = initial + (codes + refit) * self.iterations + deciding + elementwise(3 * square + 5 * entries)
        if activations is not None and activations.bits <= weights.code_bits:
            # Where the input has no more bits than the codes the start is taken to win: in W4 A4 of the reference model it does
            # for 42 linears of 42, in W4 A6 for 3, in W4 A8 for none.
            return found
        plain = weights.target_flops(rows, columns) + weights.quantize_flops(rows, columns) + elementwise(2 * entries)
        # Both errors: their terms; in one stream the energy and, with the branch multiplied out, both squares.
        errors = (whitened + elementwise(2 * entries)) * 3
        if activations is None and not original:
            errors += product(rows, rank, columns) + elementwise(2 * entries)
        else:
            streams = 1 + original + (activations is not None)
            errors += matrix_flops.branch_terms64(rows, columns, rank, streams)
        return found + plain + self._behind.fit_flops(rows, columns, tokens) + errors * 2

    def _refit_flops(self, rows: int, columns: int, *, original: bool) -> Work:
        """Of Update-LR."""
        entries, square, rank = rows * columns, columns**2, self.rank.at_most(rows, columns)
        one = product if solves_in_single(columns, self.damping) else product64
        moved = (1 + original) if self.refit == "joint" else 0
        differences = elementwise(moved * square + entries)
        if matrix_flops.finds_range(rows, columns, rank, metric=True):
            # Of the directions before, and of a few by which it is judged whether that was enough: what M^T makes of them, the
            # metric of that and M of that. Then M^T of their directions. A further step is the exception.
            few = rank + min(WEAKEST, rank)
            plain = one(rows, columns, 2 * few + rank) + one(columns, columns, few)
            regressed = (one(rows, columns, 2 * few + rank) + one(columns, columns, 2 * few + rank)) * moved
            solved = matrix_flops.solve(columns, few + rank) * (moved > 0)
            ends = matrix_flops.qr(rows, rank) + elementwise(rank * (2 * (1 + moved) * (rows + columns) + 3 * rows))
            ends += product64(rank, rows, min(WEAKEST, rank)) * 2
            return differences + cholesky(columns) + plain + regressed + solved + ends
        found = differences + product64(rank, rows, columns)
        if moved:
            # What the codes leave: its products with what the input is not, and their regression.
            found += one(rows, columns, columns) * moved + right_divide(rows, columns) + elementwise(moved * entries)
        return found + matrix_flops.directions(rows, columns, rank, definite=True)

    @property
    def _behind(self) -> SVD:
        return SVD(rank=self.rank, factor_bits=self.factor_bits)
