"""Host memory that kernels read in place: one region per model, registered with CUDA once.

torch's pin_memory rounds every tensor up to a power of two, up to twice the memory. One region costs what is asked for.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; what device allocations have, so that kernels load 16 bytes at a time


class RegistrationError(RuntimeError):
    """CUDA did not register the memory: a limit of locked memory, or a machine that does not allow it."""


class HostArena:
    """A region of host memory that kernels can read; without CUDA plain memory.

    Its views stay valid memory for as long as they live, but kernels can read them only until the arena is closed or
    collected: close it after the last kernel and the last CUDA graph that do.
    """

    def __init__(self, size: int) -> None:
        """size: bytes, as `size_of` counts them. ValueError for less than 1, RegistrationError when CUDA refuses: the
        caller may keep the tensors in device memory instead."""
        if size < 1:
            raise ValueError(f"size: {size}: expected 1 byte or more")
        # Pages of its own: torch takes a tensor for pinned when the beginning of its storage is.
        pages = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._free = self._region = torch.frombuffer(pages, dtype=torch.uint8)
        self._close = weakref.finalize(self, _unregister, _register(self._region))

    @staticmethod
    def size_of(sizes: Iterable[int]) -> int:
        """Bytes that an arena needs to place tensors of these sizes in bytes."""
        return sum(map(_rounded, sizes))

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in the arena, of the same shape and dtype, at a multiple of 256 bytes.

        ValueError when it does not fit, and after `close`.
        """
        if not self._close.alive:
            raise ValueError("arena: closed")
        if _rounded(tensor.nbytes) > self._free.nbytes:
            raise ValueError(f"tensor: {tensor.nbytes} bytes: {self._free.nbytes} of {self._region.nbytes} are left")
        view = self._free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._free = self._free[_rounded(tensor.nbytes) :]
        return view.copy_(tensor)

    def close(self) -> None:
        """Kernels can no longer read what was placed. Closing again does nothing."""
        self._close()

    def __enter__(self) -> HostArena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _register(region: Tensor) -> Tensor | None:
    """The region, to be unregistered when its time comes; None where there is no CUDA."""
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.nbytes, 0))
    except torch.cuda.CudaError as error:
        raise RegistrationError(
            f"host memory: registering {region.nbytes} bytes failed: {error}: "
            "raise the limit of locked memory, or keep residuals in device memory"
        ) from error
    return region


def _unregister(region: Tensor | None) -> None:
    if region is not None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(region.data_ptr()))
