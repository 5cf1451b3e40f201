"""GPUs by name, as far as a plan needs to know them."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.errors import RequestError

MEMORY: Mapping[str, int] = {
    name: gigabytes << 30
    for name, gigabytes in {
        "A10-24G": 24,
        "A100-40G": 40,
        "A100-80G": 80,
        "B200-180G": 180,
        "H100-80G": 80,
        "H200-141G": 141,
        "L4-24G": 24,
        "L40S-48G": 48,
        "RTX4090-24G": 24,
        "RTX5090-32G": 32,
    }.items()
}
"""Name -> bytes of its memory, as the data sheet has it."""

USABLE = 0.94
"""Share of it that tensors can have: the driver, the CUDA context and fragments take the rest."""


def memory_of(name: str) -> int:
    """Bytes of a device that tensors can have; RequestError, listing the known ones, for another name."""
    if name not in MEMORY:
        raise RequestError(f"--device: {name!r}: expected one of {', '.join(MEMORY)}")
    return int(MEMORY[name] * USABLE)
