"""Layout of the arena everywhere; that kernels read from it, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterweight.kernels.gpu.error_compensation import add_rows_
from counterweight.kernels.gpu.host_memory import HostArena, RegistrationError
from counterweight.kernels.residual import ResidualStore

TENSORS = [
    torch.arange(7, dtype=torch.int32).view(7, 1),
    torch.arange(300, dtype=torch.float16),
    torch.zeros(0, 3),
    torch.arange(64, dtype=torch.int64).view(8, 8).T,
]


def test_places_copies_side_by_side_on_aligned_addresses() -> None:
    size = HostArena.size_of(tensor.nbytes for tensor in TENSORS)
    assert size == 256 + 768 + 0 + 512
    with HostArena(size) as arena:
        views = [arena.place(tensor) for tensor in TENSORS]
    for view, tensor in zip(views, TENSORS, strict=True):
        assert torch.equal(view, tensor)
        assert view.dtype is tensor.dtype
        assert view.is_contiguous()
        assert view.numel() == 0 or view.data_ptr() % 256 == 0
    assert views[1].data_ptr() - views[0].data_ptr() == 256
    assert views[3].data_ptr() - views[1].data_ptr() == 768
    views[0].fill_(-1)
    assert torch.equal(views[1], TENSORS[1])
    assert TENSORS[0][0] == 0


def test_starts_on_a_page_and_says_when_it_is_full() -> None:
    arena = HostArena(4096)
    assert arena.place(torch.zeros(4096 - 256, dtype=torch.uint8)).data_ptr() % 4096 == 0
    arena.place(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="tensor: 1 bytes: 0 of 4096 are left"):
        arena.place(torch.zeros(1, dtype=torch.uint8))


def test_views_outlive_it_and_nothing_is_placed_after_closing() -> None:
    arena = HostArena(1024)
    view = arena.place(torch.ones(5))
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.place(torch.ones(5))
    del arena
    assert view.sum() == 5


def test_refuses_to_be_empty() -> None:
    with pytest.raises(ValueError, match="size: 0"):
        HostArena(0)


class Runtime:
    """A CUDA runtime that notes what is registered, or refuses."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.status == 0:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


class CudaError(RuntimeError):
    pass


def check_error(status: int) -> None:
    if status:
        raise CudaError(f"status {status}")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch.cuda, "CudaError", CudaError)
    return runtime


def test_registers_its_pages_once_and_lets_go_of_them(runtime: Runtime) -> None:
    arena = HostArena(5000)
    view = arena.place(torch.ones(3))
    assert runtime.registered == {view.data_ptr(): 8192}
    arena.close()
    assert runtime.registered == {}
    arena = HostArena(1)
    assert len(runtime.registered) == 1
    del arena
    assert runtime.registered == {}


def test_says_what_failed_when_registration_is_refused(runtime: Runtime) -> None:
    runtime.status = 2
    with pytest.raises(RegistrationError, match="registering 4096 bytes failed: status 2"):
        HostArena(10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_kernel_reads_from_it(device: torch.device) -> None:
    codes = torch.randint(-7, 8, (512, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    residual = ResidualStore.of(codes, torch.ones(512), torch.zeros(64)).to(device)
    with HostArena(HostArena.size_of([residual.packed.nbytes])) as arena:
        outside = replace(residual, packed=arena.place(residual.packed))
        assert outside.packed.is_pinned()
        x, channels = torch.randn(2, 64, device=device), torch.arange(0, 64, 3, device=device)
        ys = [add_rows_(torch.zeros(2, 512, device=device), x, store, channels) for store in (residual, outside)]
        torch.cuda.synchronize()
    assert torch.equal(*ys)
