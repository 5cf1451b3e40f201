"""Transforms, one file each. A further one is a file here and its class in `AnyTransform`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from counterweight.workers.methods.transforms.rotation import Rotation
from counterweight.workers.methods.transforms.smoothing import Smoothing
from counterweight.workers.methods.transforms.transform import Transform

__all__ = ["AnyTransform", "Rotation", "Smoothing", "Transform"]

AnyTransform = Annotated[Rotation | Smoothing, Field(discriminator="kind")]
