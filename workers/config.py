"""The base of every typed configuration that a manifest can hold."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, keyword-only, no unknown keys, no NaN or infinity: what the manifest says is what runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
