"""Where a kernel runs, and what differs there: compiled on a GPU, or under Triton's interpreter on a CPU.

Triton settles at import which of the two a process does (TRITON_INTERPRET=1 is the interpreter), so one process does one.
The interpreter computes bfloat16 as if it were an integer: kernels take it to float32 as they load it.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def runs_on(device: torch.device) -> bool:
    """Whether tensors on this device can be handed to a kernel in this process."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """The constants COMPUTE (type of a dot's operands), PRECISION (of float32 dots) and ASM (inline assembly allowed) of a
    kernel whose activations have `dtype`.

    Sums are float32 everywhere. Raises ValueError for a dtype other than float16, bfloat16 and float32.
    """
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"dtype: {dtype}: expected float16, bfloat16 or float32")
    compute = tl.float32 if INTERPRETED else _TRITON_DTYPES[dtype]
    return {"COMPUTE": compute, "PRECISION": "ieee", "ASM": not INTERPRETED}


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes `device` the current one while a kernel is launched: Triton launches on the current device, not on its tensors'."""
    if device.type == "cuda":
        return torch.cuda.device(device)  # type: ignore[no-any-return, unused-ignore]
    return contextlib.nullcontext()
