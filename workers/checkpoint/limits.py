"""What a checkpoint may have at most, for whoever looks at it before torch is loaded."""

from __future__ import annotations

MAX_TENSORS = 200_000
"""A trillion-parameter model with one tensor per expert's linear has about 140,000."""
