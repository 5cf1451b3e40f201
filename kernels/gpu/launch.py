"""Where a kernel runs, and what differs there: compiled on a GPU, or under Triton's interpreter on a CPU.

Triton settles at import which of the two a process does (TRITON_INTERPRET=1 is the interpreter), so one process does one.
The interpreter computes bfloat16 as if it were an integer: kernels take it to float32 as they load it.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
import triton
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


def waits(major: int) -> bool:
    """The constant WAIT of a kernel for a device of compute capability `major`: whether it must wait for all products under way
    before it computes the registers that the next one reads.

    On Hopper tensor cores read a left operand out of registers while the program goes on. Triton before 3.9 lets it overwrite
    them meanwhile (triton-lang/triton, issue 9433): on an H200 prompts of 300 tokens came out wrong, and differently each
    time. `kernels.gate` finds such writes in what was compiled.
    """
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return not INTERPRETED and major == 9 and version < (3, 9)


def major_of(device: torch.device) -> int:
    """Compute capability of a device, 9 for 9.0; under the interpreter Hopper's, so that what runs there is tried."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes `device` the current one while a kernel is launched: Triton launches on the current device, not on its tensors'."""
    if device.type == "cuda":
        return torch.cuda.device(device)  # type: ignore[no-any-return, unused-ignore]
    return contextlib.nullcontext()
