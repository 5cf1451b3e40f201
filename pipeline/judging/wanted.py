"""What `eval` and `compare` are asked for. Free of torch: the command's help waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be measured, and where. against: the original; None: where it was, or the first plain model. text: URI; None:
    those of a report. windows: how many of it; None: all, or as many as the report has. sequence_length: tokens of one; None:
    the report's. note: told what is being done."""

    against: str | None = None
    text: str | None = None
    windows: int | None = None
    sequence_length: int | None = None
    device: str = "cpu"
    note: Callable[[str], None] = lambda line: None
