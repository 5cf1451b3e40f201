"""What every compensation answers: how the error that codes leave is put back. `workers/compensation` has the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from counterweight.workers.config import Method
from counterweight.workers.matrix_flops import NOTHING, Work
from counterweight.workers.methods.compensations.rank import Rank

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.compensation.aser import TakenOut
    from counterweight.workers.compensation.lrc import LRCResult
    from counterweight.workers.compensation.result import CompensationResult
    from counterweight.workers.methods.activations import Activations
    from counterweight.workers.methods.weights.stored import StoredWeights


class Compensation(Method):
    """What every compensation answers; here, for one that does nothing."""

    joint: ClassVar[bool] = False
    """Whether codes and branch are fitted to each other: see `solve`."""
    needs_rows: ClassVar[bool] = False
    """Whether it looks at rows of the input before statistics are gathered: see `take_out`."""

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a layer [rows, columns] cannot have it, or None when it can."""
        del rows, columns
        return None

    @property
    def anticipates(self) -> bool:
        """Whether the quantizer is told of what will follow: see `foresee`."""
        return False

    @property
    def needs_magnitudes(self) -> bool:
        """Whether sum |x| must be gathered."""
        return False

    @property
    def needs_products(self) -> bool:
        """Whether second moments of the input must be gathered."""
        return False

    @property
    def of_finished_codes(self) -> bool:
        """Whether it can follow codes that something else has chosen."""
        return True

    @property
    def scales_inputs(self) -> bool:
        """Whether what it takes out comes with scales of the input."""
        return False

    @property
    def branch_rank(self) -> Rank | None:
        """How the rank of its branch is asked for; None without a branch."""
        return None

    @property
    def branch_bits(self) -> Literal[4, 8] | None:
        """Bits of the branch's factors; None for those of the source's dtype."""
        return None

    def gathers(self) -> dict[str, object]:
        """What calibration looks at: two compensations with equal values can follow the same statistics."""
        return self.model_dump(mode="json") if self.needs_rows else {"magnitudes": self.needs_magnitudes}

    def with_rank(self, count: int) -> Compensation:
        """The same with a branch of this rank, none for 0; itself, without a branch."""
        del count
        return self

    def take_out(self, weights: Sequence[Tensor], magnitude: Tensor, rows: int) -> TakenOut | None:
        """Channels of the input to take out of the codes of a linear with `rows` outputs, which `fit` gives back. weights:
        all [out, in] that read the input; magnitude: E|x| [in] float64."""
        del weights, magnitude, rows
        return None

    def foresee(self, statistics: InputStatistics, rows: int) -> InputStatistics:
        """The statistics with which to quantize a layer of `rows` outputs that this will follow."""
        del rows
        return statistics

    def fit(
        self,
        residual: Tensor,
        statistics: InputStatistics | None,
        *,
        taken: Tensor | None = None,
        dtype: torch.dtype,
    ) -> CompensationResult:
        """The branch for `residual` [out, in] = W - Q, with factors stored in `dtype`. taken: channels of the input that
        `take_out` left out of the codes, so that their columns of the residual are whole."""
        from counterweight.workers.compensation.result import CompensationResult

        del residual, statistics, taken, dtype
        return CompensationResult(low_rank=None)

    def gain_problem(self, weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor] | None:
        """A matrix [out, in] and a root [in, in] of a metric, float64, whose product's squared singular values say what each
        rank of the branch wins of `weight` [out, in] float64, before there are codes; None where codes are needed for it."""
        del weight, statistics
        return None

    def solve(
        self,
        weights: StoredWeights,
        layers: Sequence[tuple[Tensor, InputStatistics]],
        *,
        scale_dtype: torch.dtype,
        factor_dtype: torch.dtype,
        at_once: int | None = None,
    ) -> list[LRCResult]:
        """Codes and branch of each of `layers` where they are `joint`; TypeError elsewhere. layers: weights [out, in] float32,
        of one shape, with the statistics of their inputs; each gets what it gets alone. at_once: of how many codes may be
        chosen in one batch; None: of all."""
        raise TypeError(f"{type(self).__name__}: expected a compensation that is joint")

    def foresee_bytes(self, columns: int) -> int:
        """Memory of `foresee` at its peak, beside the statistics that it is given; a quarter of it stays."""
        del columns
        return 0

    def fit_bytes(self, rows: int, columns: int, tokens: float) -> int:
        """Memory of `fit` at its peak, beside the residual [rows, columns] float32. tokens: that calibration has seen."""
        del rows, columns, tokens
        return 0

    def solve_bytes(
        self, weights: StoredWeights, rows: int, columns: int, tokens: float, batch: int = 1, *, siblings: bool = False
    ) -> int:
        """Memory of `solve` at its peak beside weights [rows, columns] float32, if `joint`. batch: of how many codes are chosen
        in one; siblings: whether linears share an input."""
        del weights, rows, columns, tokens, batch, siblings
        return 0

    def foresee_flops(self, rows: int, columns: int) -> Work:
        """Arithmetic of `foresee`."""
        del rows, columns
        return NOTHING

    def fit_flops(self, rows: int, columns: int, tokens: float) -> Work:
        """Arithmetic of `fit` for a residual [rows, columns]. tokens: that calibration has seen."""
        del rows, columns, tokens
        return NOTHING

    def gain_flops(self, rows: int, columns: int, tokens: float, *, original: bool) -> Work | None:
        """Arithmetic of `gain_problem`; None where codes are needed for it. original: as for `solve_flops`."""
        del rows, columns, tokens, original
        return None

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
        """Arithmetic of `solve` for `count` weights [rows, columns] that share an input. original: whether the input in the
        original model is another; activations: how the input is quantized."""
        del weights, rows, columns, tokens, count, original, activations
        return NOTHING
