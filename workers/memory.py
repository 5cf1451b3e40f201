"""Memory of this process: the peak of one task, on the host and on a GPU, and what is said where there is none left."""

from __future__ import annotations

import ctypes
import errno
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_LIBC = ctypes.CDLL(None)

_REFUSED = ("can't allocate memory", "can't start new thread")
"""What torch's allocator of host memory and Python's threads say; both raise a bare RuntimeError."""


def reset_peak(device: torch.device) -> None:
    """Begins a new measurement. Where the kernel cannot reset its high-water mark, the peak is the process's whole life's."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def host_peak_bytes() -> int:
    """Largest resident set since `reset_peak`, in bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def device_peak_bytes(device: torch.device) -> int:
    """Largest allocation on the GPU since `reset_peak`, in bytes; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def gpu_bytes(device: torch.device) -> int:
    """Memory of the whole GPU; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def settle() -> None:
    """Takes everything that is imported by now out of the garbage collector's sight, so that `release` looks at the
    objects of one task and not at those of torch and transformers (150 ms against a few)."""
    gc.collect()
    gc.freeze()


def release(device: torch.device) -> None:
    """Gives back what a finished block held, so that the next one starts from the same level."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Gives memory that the allocator keeps for later back to the system, where the C library can (glibc). It keeps tensors of
    up to 32 MiB, for each thread by itself, so that otherwise every phase of a task would pay for those before it."""
    if sys.platform == "linux" and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def ran_out(error: Exception) -> bool:
    """Whether an error says that the system, or a limit of this process, has refused memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    refused = isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSED)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)
