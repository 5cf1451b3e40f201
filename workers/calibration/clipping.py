"""The share of a token's largest magnitude that activation codes should reach."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.methods.activations import CLIPS, Activations


def activation_format(asked: Activations, clip: float = 1.0) -> ActivationFormat:
    """How activations are quantized, as a value for kernels; `clip` takes the place of a search."""
    return ActivationFormat(
        bits=asked.bits, clip=clip if asked.clip == "search" else asked.clip, group_size=asked.group_size
    )


def best_clip(rows: Tensor, asked: Activations) -> float:
    """The candidate with the smallest squared error of quantizing `rows` [..., in]; the largest of those that tie."""
    exact = rows.float()

    def error(clip: float) -> float:
        found = fake_quantize_activations(exact, activation_format(asked, clip))
        return float((found - exact).square().sum(dtype=torch.float64))

    return min(CLIPS, key=error)
