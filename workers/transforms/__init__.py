"""Transforms that change a model's weights and activations and not what it computes."""

from __future__ import annotations

from counterweight.workers.transforms.rotation import (
    residual_hadamard,
    residual_rotation,
    rotate_block,
    rotate_embedding,
    rotate_head,
)

__all__ = ["residual_hadamard", "residual_rotation", "rotate_block", "rotate_embedding", "rotate_head"]
