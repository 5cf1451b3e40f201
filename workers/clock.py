"""The account of one task: where its seconds went, how much memory it took."""

from __future__ import annotations

import time

import torch

from counterweight.workers.memory import device_peak_bytes, host_peak_bytes, reset_peak
from counterweight.workers.tasks.records import Timing


class Clock:
    """Seconds per phase and peak memory of one task."""

    def __init__(self, device: torch.device, before: Timing | None = None) -> None:
        self._device, self._timing = device, before or Timing(device=device.type)
        self._peak = (0, 0) if before is None else (before.host_peak_bytes, before.device_peak_bytes)
        reset_peak(device)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Books the time since the last lap under `phase`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        spent = getattr(self._timing, phase) + now - self._last
        self._timing = self._timing.model_copy(update={phase: spent})
        self._last = now

    def timing(self) -> Timing:
        """The account so far."""
        return self._timing.model_copy(
            update={
                "host_peak_bytes": max(self._peak[0], host_peak_bytes()),
                "device_peak_bytes": max(self._peak[1], device_peak_bytes(self._device)),
            }
        )
