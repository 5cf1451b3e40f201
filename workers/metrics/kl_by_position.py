"""How the divergence from the original drifts along a window: its mean over positions 0, 1, 2 to 3, 4 to 7 and so on."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Comparison, Profile


def _divergences(window: Comparison) -> tuple[float, ...]:
    """In nats, one for each of `_ranges`."""
    import torch

    divergence = window.divergence.to(torch.float64)
    return tuple(max(float(divergence[part.start : part.stop].mean()), 0.0) for part in _ranges(len(divergence)))


def _ranges(length: int) -> tuple[range, ...]:
    """Position 0, then up to powers of two."""
    starts = [0, *(1 << bit for bit in range((length - 1).bit_length()))]
    return tuple(range(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True))


PROFILE = Profile(
    name="kl_by_position",
    label="KL by position, nats per token",
    ranges=_ranges,
    of_window=_divergences,
)
