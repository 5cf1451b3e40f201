"""Counterweight: compensated compression of large language models.

The storeys `pipeline`, `workers` and `kernels` are folders of the repository, linked here so that one import package holds
them all. In Python, a job is run by `counterweight.pipeline.run.run_job`; an artifact is loaded by `counterweight.load_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.pipeline.artifact.load import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> object:
    # torch and transformers are imported when `load_model` is asked for: the command's help need not wait for them
    if name == "load_model":
        from counterweight.pipeline.artifact.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
