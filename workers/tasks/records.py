"""What records of several tasks are made of, and reports show: times, the fate of a tensor, what became of a linear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from counterweight.workers.config import Config
from counterweight.workers.workspace import Blob, Record


class Timing(Config):
    """Where a task's time went, in seconds, and its memory's high-water marks, in bytes."""

    load: float = 0.0
    forward: float = 0.0
    solve: float = 0.0
    write: float = 0.0
    host_peak_bytes: int = 0
    device_peak_bytes: int = 0
    device: str = "cpu"

    @property
    def total(self) -> float:
        return self.load + self.forward + self.solve + self.write

    @classmethod
    def of_all(cls, parts: Iterable[Timing]) -> Timing:
        """Seconds of all of them, and the highest of their marks."""
        found = cls()
        for part in parts:
            seconds = {
                phase: getattr(found, phase) + getattr(part, phase) for phase in ("load", "forward", "solve", "write")
            }
            host = max(found.host_peak_bytes, part.host_peak_bytes)
            device = max(found.device_peak_bytes, part.device_peak_bytes)
            found = cls(**seconds, host_peak_bytes=host, device_peak_bytes=device, device=part.device)
        return found


class HiddenRecord(Record):
    """Hidden states at a block's boundary, one blob per shard."""

    outputs: tuple[Blob, ...]
    timing: Timing

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        return self.outputs


class LedgerEntry(Config):
    """What became of one source tensor."""

    source: str
    shape: tuple[int, ...]
    fate: Literal["quantized", "kept", "dropped"]
    stored_as: tuple[str, ...]
    """Names of the checkpoint's tensors that hold it; empty when dropped."""
    reason: str = ""


STARVED = "experts.starved"
"""Step of the fall-back of an expert's linear that was solved on tokens of its layer beside its own."""


class FallbackReport(Config):
    """A departure from the recipe that was necessary, with its cause; never silent."""

    step: str
    cause: str


class HeldOutErrors(Config):
    """Errors of a linear, as in `ModuleReport`, on tokens that nothing was solved on. tokens: how many. of_layer: of an expert
    that sees hardly any, that the router sent them elsewhere. quantized, compensated: None when the layer makes zeros of them.
    spectrum: shares of what the branch adds to the output that its best 1, 2, 4, ... and all directions hold; empty without
    a branch.
    """

    tokens: int
    of_layer: bool = False
    quantized: float | None
    compensated: float | None
    spectrum: tuple[float, ...] = ()


class ModuleReport(Config):
    """What one linear layer cost and won.

    error_quantized, error_compensated: squared error of the output over the tokens that the layer was solved on, quantized
    inputs included, relative to the original output, before and after the low-rank branch; None when no token reached the
    layer, and where `held_out` has the same of other tokens (records before November 2026 have both). held_out: None where
    there were no others. drawn: how many of the tokens are of sequences that were drawn for experts which saw too few. Bits
    are of storage, in sum over the layer.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int | None
    rank: int
    tokens: int
    drawn: int = 0
    code_bits: int
    scale_bits: int
    factor_bits: int
    residual_bits: int = 0
    error_quantized: float | None
    error_compensated: float | None
    held_out: HeldOutErrors | None = None
    fallbacks: tuple[FallbackReport, ...] = ()
    seconds: float

    @property
    def error_before(self) -> float | None:
        """Without the branch: on held-out tokens where there were any, and otherwise on those that were solved on."""
        return self.error_quantized if self.held_out is None else self.held_out.quantized

    @property
    def error_after(self) -> float | None:
        """Likewise with it."""
        return self.error_compensated if self.held_out is None else self.held_out.compensated
