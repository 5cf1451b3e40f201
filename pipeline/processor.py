"""What this machine's processor has no instructions for, and so computes many times slower; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.pipeline.manifest import CompressionJob

CPUINFO = Path("/proc/cpuinfo")
"""Linux's; elsewhere nothing is known."""

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions for products in bfloat16, as x86 and ARM call them."""


def multiplies_bfloat16() -> bool:
    """Whether it has such instructions; also where that is not known."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return True
    flags = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return not flags or not BFLOAT16.isdisjoint(flags[0])


def emulated(job: CompressionJob) -> str | None:
    """What should be known of a job that computes in a dtype which this processor emulates; None of others, and of those on
    GPUs."""
    if job.spec.resources.gpus_per_worker > 0 or multiplies_bfloat16():
        return None
    parts = {"calibration": job.spec.calibration, "validation": job.spec.validation}
    asked = [name for name, part in parts.items() if part is not None and part.compute_dtype == "bfloat16"]
    if not asked:
        return None
    fields = " and ".join(f"spec.{name}.compute_dtype" for name in asked)
    return (
        f"{fields}: bfloat16: this machine's processor has no instructions for it: float32 is 10 times faster or more"
    )
