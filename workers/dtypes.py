"""Types that models compute in, as manifests name them. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ComputeDtype = Literal["float32", "bfloat16"]
"""Types that blocks are calibrated in."""

ModelDtype = Literal["float32", "bfloat16", "float16"]
"""Types that a whole model runs in, when it is judged."""

ITEMSIZE: Mapping[ModelDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an activation."""
