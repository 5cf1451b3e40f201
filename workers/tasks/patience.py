"""How long a task may take before it is taken to hang: a bound for the slowest machine that anybody would use, many times what
it takes. It decides nothing but whether a job ends in an error or goes on waiting (`pipeline.silence`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.workers.tasks.setting import Device

BASE_SECONDS = 1200.0
"""Of the smallest task: an outage of the storage that is waited for (ten minutes), and as long again."""

BYTES_PER_SECOND = 1e7
FLOPS_PER_SECOND = {"cpu": 1e8, "cuda": 1e11}
"""About a hundredth of what one thread of a processor, or a GPU, does."""


def patience(*, bytes: float = 0, flops: float = 0, device: Device = "cpu") -> float:
    """Seconds for a task that reads and writes so many bytes and does so many floating-point operations."""
    return BASE_SECONDS + bytes / BYTES_PER_SECOND + flops / FLOPS_PER_SECOND[device]
