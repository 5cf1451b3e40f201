"""The control plane of Counterweight: what is to be done, where, in what order, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["load_model"]


def load_model(
    uri: str, *, device: str = "cpu", dtype: torch.dtype | None = None, compensated: bool = True
) -> PreTrainedModel:
    """A published artifact as a transformers model, ready for `generate`; see `pipeline.serving.load_model`."""
    from pipeline.serving import load_model as load  # torch and transformers are imported when they are needed

    return load(uri, device=device, dtype=dtype, compensated=compensated)
