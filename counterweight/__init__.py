"""Counterweight: compensated compression of large language models.

The storeys `pipeline`, `workers` and `kernels` are folders of the repository, linked here so that one import package holds
them all. In Python, a job is run by `counterweight.pipeline.run.run_job`; an artifact is loaded by `load_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["load_model"]


def load_model(
    uri: str, *, device: str = "cpu", dtype: torch.dtype | None = None, compensated: bool = True
) -> PreTrainedModel:
    """A published artifact as a transformers model, ready for `generate`; see `counterweight.pipeline.artifact.load`."""
    # torch and transformers are imported when needed
    from counterweight.pipeline.artifact.load import load_model as load

    return load(uri, device=device, dtype=dtype, compensated=compensated)
