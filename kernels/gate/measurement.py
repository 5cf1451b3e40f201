"""What a compiled kernel uses."""

from __future__ import annotations

from dataclasses import dataclass

from counterweight.kernels.gate.case import Case

_THREADS_PER_WARP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """registers: per thread; stack: bytes per thread; spills: instructions that touch it; hazards: instructions that overwrite
    what a product under way reads; shared: bytes per program; hot_loop: instructions in one turn of the longest innermost
    loop; opcodes: those that occur, sorted."""

    registers: int
    stack: int
    spills: int
    hazards: int
    shared: int
    hot_loop: int
    opcodes: tuple[str, ...]

    def instructions_per_weight(self, case: Case) -> float | None:
        """Of one thread, in the hot loop, to two decimals; None when the case is not held to it."""
        if not case.weights_per_iteration:
            return None
        threads = _THREADS_PER_WARP * case.options.get("num_warps", 4)
        return round(threads * self.hot_loop / case.weights_per_iteration, 2)
