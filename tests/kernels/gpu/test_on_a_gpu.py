"""What only a GPU can show: real shapes in bfloat16 against float64, CUDA graphs, residual rows in pinned host memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.hadamard import transform
from counterweight.kernels.gpu.host_memory import HostArena
from counterweight.kernels.gpu.linear import KernelLinear
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.reference import linear
from counterweight.kernels.residual import Correction, ResidualStore
from counterweight.kernels.weights.uniform import UniformWeight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(6144, 4096), (4096, 14336), (1000, 4096)]


def weight(rows: int, columns: int, bits: int, group_size: int | None) -> UniformWeight:
    half = 1 << (bits - 1)
    groups = 1 if group_size is None else columns // group_size
    return UniformWeight(
        codes=torch.randint(-half, half, (rows, columns), dtype=torch.int8, device="cuda"),
        scale=(0.001 + 0.01 * torch.rand(rows, groups, device="cuda")).bfloat16(),
        zero_point=None,
        bits=bits,
        group_size=group_size,
    )


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(1, tokens, columns, device="cuda").bfloat16()


@pytest.mark.parametrize("tokens", [1, 5, 16, 32, 33, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [None, 8, 4], ids=["A16", "A8", "A4"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, None), (3, 128), (2, 64), (8, None)])
def test_a_real_layer(bits: int, group_size: int | None, form: int | None, shape: tuple[int, int], tokens: int) -> None:
    rows, columns = shape
    quantized = weight(rows, columns, bits, group_size)
    branch = LowRank(
        up=torch.randn(rows, 60, device="cuda").bfloat16() / 60,
        down=torch.randn(60, columns, device="cuda").bfloat16() / 60,
    )
    activations = None if form is None else ActivationFormat(bits=form, clip=0.9)
    layer = KernelLinear(CompensatedLinear(quantized, low_rank=branch, activations=activations))
    x = inputs(tokens, columns)
    expected = linear(x, quantized, low_rank=branch, activations=activations)
    found = layer(x)
    assert (found.double() - expected).norm() < 6e-3 * expected.norm()
    assert torch.equal(layer(x), found), "not the same bits twice"


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = run()
    return graph, y


@pytest.mark.parametrize("selection", ["chunked", "static"])
def test_a_decoding_step_in_a_graph_reads_rows_out_of_host_memory(selection: str) -> None:
    rows, columns = 4096, 14336
    codes = torch.randint(-7, 8, (rows, columns), dtype=torch.int8)
    store = ResidualStore.of(codes, torch.rand(rows), torch.linspace(4, 0, columns))
    importance = torch.rand(columns) if selection == "static" else None
    correction = Correction(store=store, selection=selection, channels_per_chunk=8, importance=importance)  # type: ignore[arg-type]
    hadamard, quantized = Hadamard(size=columns), weight(rows, columns, 4, 128)
    on_device = correction.to(torch.device("cuda"))
    # Of the very numbers that channels are chosen among: nearly equal ones are equal in bfloat16.
    behind_transform = CompensatedLinear(quantized, residual=on_device)
    with HostArena(HostArena.size_of([store.packed.nbytes])) as arena:
        layer = KernelLinear(CompensatedLinear(quantized, transform=hadamard, residual=on_device), arena)
        assert layer.residual is not None
        assert not layer.residual.store.packed.is_cuda
        x = inputs(1, columns)
        graph, y = captured(lambda: layer(x))
        for _ in range(3):
            x.copy_(inputs(1, columns))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, layer(x))
            expected = behind_transform(transform(x[0], hadamard).float()).double()
            assert (y[0].double() - expected).norm() < 2e-2 * expected.norm()
