"""Quantizers, one file each. A further one is a file here and its class in `AnyQuantizer`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from counterweight.workers.methods.quantizers.gptq import GPTQ
from counterweight.workers.methods.quantizers.quantizer import Quantizer
from counterweight.workers.methods.quantizers.rtn import RTN

__all__ = ["GPTQ", "RTN", "AnyQuantizer", "Quantizer"]

AnyQuantizer = Annotated[RTN | GPTQ, Field(discriminator="kind")]
