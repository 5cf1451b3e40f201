"""Inference kernels on a GPU: time, share of what memory allows, against torch in bfloat16, tinygemm, and gemlite if installed.

    python benchmarks/gpu_kernels.py [--tables gemv,gemm,branch,input,residual,experts,helpers] [--minutes 8] [--record]
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --smoke   # does it run? tiny shapes, no figures

The floor of each row is the bytes that must move (codes, scales, factors, input, output) at the bandwidth of a copy, or the
arithmetic at the rate of torch's own bfloat16 product, whichever takes longer, both measured in the same run. Each call reads
another set of weights out of a ring larger than the cache, and a CUDA graph holds the ring, so neither the cache nor the host
flatters or hides anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from common import machine, record, table, versions
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.activations import prepare
from counterweight.kernels.gpu.error_compensation import compensate_
from counterweight.kernels.gpu.experts import align_tokens, block_of, expert_gemm
from counterweight.kernels.gpu.gram import add_gram_
from counterweight.kernels.gpu.hadamard import transform
from counterweight.kernels.gpu.host_memory import HostArena
from counterweight.kernels.gpu.integer_gemm import integer_gemm, prepare_integer
from counterweight.kernels.gpu.launch import INTERPRETED
from counterweight.kernels.gpu.layout import PackedWeight, prepare_weight, stack_weights
from counterweight.kernels.gpu.weight_gemm import weight_gemm
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.residual import ResidualStore
from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.calibration.triangle import LowerTriangle

SHAPES = {
    "8B qkv": (6144, 4096),
    "8B gate-up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B square": (8192, 8192),
    "70B gate-up": (57344, 8192),
}
SMOKE = {"tiny": (128, 128)}
DECODED, MANY = (1, 4, 16), (64, 256, 1024, 4096)
MIXTRAL = (8, 2, 14336, 4096)  # experts, of each token, rows, columns
CACHE = 60 << 20
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured here: bytes per second of a copy (read and write counted), operations per second of a large product."""

    bandwidth: float
    rate: float

    def floor(self, moved: float, operations: float = 0.0) -> float:
        return max(moved / self.bandwidth, operations / self.rate)


Call = Callable[[], object]


def seconds(calls: list[Call], repeats: int = 20) -> float:
    """Median time of one of `calls`, which follow one another in a CUDA graph; under the interpreter of the first alone."""
    if INTERPRETED:
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3 / len(calls))
    return statistics.median(times)


def ring(moved: float) -> int:
    """How many sets of weights of `moved` bytes are more than four caches; at least 2, at most 64."""
    return 1 if INTERPRETED else int(min(64, max(2, 4 * CACHE // moved + 1)))


def random_weight(rows: int, columns: int, bits: int = 4, group_size: int | None = 128) -> UniformWeight:
    half = 1 << (bits - 1)
    groups = 1 if group_size is None else columns // group_size
    return UniformWeight(
        codes=torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=DEVICE),
        scale=(torch.rand(rows, groups, device=DEVICE) * 0.01 + 0.001).to(DTYPE),
        zero_point=None,
        bits=bits,
        group_size=group_size,
    )


def stored(weight: PackedWeight) -> int:
    return sum(plane.nbytes for plane in weight.planes) + weight.scale.nbytes


def random_input(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device=DEVICE).to(DTYPE)


def measured() -> Machine:
    """The machine's two rates."""
    size = 1 << 12 if INTERPRETED else 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    bandwidth = 2 * size / seconds([lambda: target.copy_(source)])
    side = 64 if INTERPRETED else 8192
    a, b = random_input(side, side), random_input(side, side)
    return Machine(bandwidth, 2 * side**3 / seconds([lambda: a @ b]))


Row = list[str]
HEADER = [
    "kernel",
    "shape",
    "tokens",
    "us",
    "floor, us",
    "share of floor",
    "times torch bf16",
    "times tinygemm",
    "times gemlite",
    "error",
]


def row(
    name: str,
    shape: str,
    tokens: int,
    taken: float,
    floor: float,
    dense: float | None = None,
    tiny: float | None = None,
    gemlite: float | None = None,
    error: float | None = None,
) -> Row:
    ratios = ["" if other is None else f"{other / taken:.2f}" for other in (dense, tiny, gemlite)]
    return [
        name,
        shape,
        str(tokens),
        f"{1e6 * taken:.1f}",
        f"{1e6 * floor:.1f}",
        f"{floor / taken:.2f}",
        *ratios,
        "" if error is None else f"{error:.1e}",
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    return float((found.double() - expected).norm() / expected.norm())


def torch_seconds(rows: int, columns: int, tokens: int) -> float:
    count = ring(2 * rows * columns)
    weights = [torch.randn(rows, columns, device=DEVICE).to(DTYPE) for _ in range(count)]
    x = random_input(tokens, columns)
    return seconds([lambda w=w: functional.linear(x, w) for w in weights])  # type: ignore[misc]


def tinygemm_seconds(rows: int, columns: int, tokens: int) -> float | None:
    """torch's own int4 product, groups of 128; None where it is not there."""
    if INTERPRETED:
        return None
    try:
        codes = torch.randint(0, 255, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
        packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(ring(rows * columns / 2))]
        scales = torch.rand(columns // 128, rows, 2, device=DEVICE).to(DTYPE)
        x = random_input(tokens, columns)
        return seconds([lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in packed])  # type: ignore[misc]
    except RuntimeError:
        return None


def gemlite_seconds(weight: UniformWeight, tokens: int) -> float | None:
    """gemlite's int4 product with the same weight; None where it is not installed. ValueError when its result is not ours."""
    if INTERPRETED or find_spec("gemlite") is None:
        return None
    from gemlite import DType, GemLiteLinear

    rows, columns = weight.codes.shape

    def made() -> torch.nn.Module:
        sizes = {"group_size": 128, "in_features": columns, "out_features": rows}
        layer = GemLiteLinear(4, **sizes, input_dtype=DType.BF16, output_dtype=DType.BF16)
        zeros = torch.full_like(weight.scale, 8)
        layer.pack((weight.codes + 8).to(torch.uint8), weight.scale.clone(), zeros, None)
        packed: torch.nn.Module = layer
        return packed

    layers = [made() for _ in range(ring(rows * columns / 2))]
    x = random_input(tokens, columns)
    error = relative(layers[0](x), x.double() @ weight.dequantize(torch.float64).T)
    if error > 0.05:
        raise ValueError(f"gemlite: relative error {error:.2g}: expected the same product")
    return seconds([lambda one=one: one(x) for one in layers])  # type: ignore[misc]


def gemv(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """K1 for decoding: W4A16 in groups of 128, W4A8 per channel, and the other widths."""
    for shape, (n, k) in shapes.items():
        for tokens in DECODED:
            dense, tiny = torch_seconds(n, k, tokens), tinygemm_seconds(n, k, tokens)
            for bits, group, quantized in (
                (4, 128, None),
                (4, None, 8),
                (3, 128, None),
                (2, 128, None),
                (8, None, None),
            ):
                if bits != 4 and tokens != 1:
                    continue
                first = random_weight(n, k, bits, group)
                other = gemlite_seconds(first, tokens) if (bits, group) == (4, 128) else None
                weight = prepare_weight(first)
                copies = [weight, *(_copy(weight) for _ in range(ring(stored(weight)) - 1))]
                x = random_input(tokens, k)
                form = None if quantized is None else ActivationFormat(bits=quantized)
                prepared = prepare(x, weight, activations=form)
                taken = seconds([lambda w=w, p=prepared: weight_gemm(p, w) for w in copies])  # type: ignore[misc]
                moved = stored(weight) + 2 * tokens * (n + k)
                error = None
                if form is None:
                    error = relative(weight_gemm(prepared, weight), x.double() @ first.dequantize(torch.float64).T)
                name = f"W{bits}A{quantized or 16}, {'per channel' if group is None else f'groups of {group}'}"
                yield row(
                    name, shape, tokens, taken, found.floor(moved), dense, tiny if bits == 4 else None, other, error
                )


def gemm(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """K1 for prompts and K3."""
    for shape, (n, k) in shapes.items():
        for tokens in (40,) if INTERPRETED else MANY:
            dense = torch_seconds(n, k, tokens)
            quantized = random_weight(n, k)
            weight = prepare_weight(quantized)
            x = random_input(tokens, k)
            prepared = prepare(x, weight)
            operations = 2 * tokens * n * k
            yield row(
                "W4A16 prompt, groups of 128",
                shape,
                tokens,
                seconds([lambda p=prepared, w=weight: weight_gemm(p, w)]),  # type: ignore[misc]
                found.floor(stored(weight) + 2 * tokens * (n + k), operations),
                dense,
            )
            for group in (None, 128):
                integer = prepare_integer(random_weight(n, k, 4, group))
                codes = prepare(x, integer, activations=ActivationFormat(bits=8))
                yield row(
                    f"W4A8 prompt, {'per channel' if group is None else 'groups of 128'}",
                    shape,
                    tokens,
                    seconds([lambda c=codes, w=integer: integer_gemm(c, w, out_dtype=DTYPE)]),  # type: ignore[misc]
                    found.floor(integer.codes.nbytes + tokens * (2 * n + k), operations / 2),
                    dense,
                )


def branch(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """K1 with a low-rank branch in its epilogue, beside the same branch as two products of torch."""
    for shape, (n, k) in shapes.items():
        weight = prepare_weight(random_weight(n, k))
        x = random_input(1, k)
        for rank in (8,) if INTERPRETED else (64, 128, 410):
            down, up = random_input(rank, k), random_input(n, rank)
            count = ring(stored(weight) + 2 * rank * (n + k))
            sets = [(weight, up, down), *((_copy(weight), up.clone(), down.clone()) for _ in range(count - 1))]

            def fused(w: PackedWeight, u: Tensor, d: Tensor, x: Tensor = x) -> Tensor:
                return weight_gemm(prepare(x, w, down=d), w, up=u)

            def apart(w: PackedWeight, u: Tensor, d: Tensor, x: Tensor = x) -> Tensor:
                return weight_gemm(prepare(x, w), w) + (x @ d.T) @ u.T

            moved = stored(weight) + 2 * rank * (n + k) + 2 * (n + k)
            for name, way in (("fused", fused), ("torch beside it", apart)):
                taken = seconds([lambda s=s, way=way: way(*s) for s in sets])  # type: ignore[misc]
                yield row(f"W4A16 + rank {rank}, {name}", shape, 1, taken, found.floor(moved))


def inputs(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """K2: quantization, sums and projection in one pass."""
    for shape, (n, k) in shapes.items():
        quantized = random_weight(min(n, 4096), k)
        for tokens in (1, 4) if INTERPRETED else (1, 16, 1024, 4096):
            weight = prepare_weight(quantized) if tokens <= 32 else prepare_integer(quantized)
            x, down = random_input(tokens, k), random_input(8 if INTERPRETED else 64, k)
            form = ActivationFormat(bits=8)
            taken = seconds([lambda w=weight, x=x, d=down, f=form: prepare(x, w, activations=f, down=d)])  # type: ignore[misc]
            moved = x.nbytes * 2 + tokens * k + down.nbytes
            yield row("input: 8 bits, rank 64", shape, tokens, taken, found.floor(moved))


def residual(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """K4: residual rows out of host memory, alone and beside the layer that they hide behind."""
    for shape, (n, k) in shapes.items():
        codes = torch.randint(-7, 8, (n, k), dtype=torch.int8)
        store = ResidualStore.of(codes, torch.rand(n), torch.linspace(4, 0, k))
        with HostArena(HostArena.size_of([store.packed.nbytes])) as arena:
            placed = replace(store.to(DEVICE), packed=arena.place(store.packed))
            weight = prepare_weight(random_weight(n, k))
            x = random_input(1, k)
            y = torch.zeros(1, n, device=DEVICE)
            alone = seconds([lambda w=weight, x=x: weight_gemm(prepare(x, w), w)])  # type: ignore[misc]
            for per_chunk in (4,) if INTERPRETED else (4, 8, 16):
                taken = seconds([lambda y=y, x=x, p=placed, c=per_chunk: compensate_(y, x, p, c)])  # type: ignore[misc]
                bytes_read = max(1, per_chunk * k // 1024) * store.packed.shape[1] * 4
                rate = f"{bytes_read / taken / 1e9:.1f} GB/s over PCIe; the layer alone {1e6 * alone:.1f} us"
                yield [*row(f"residual, {per_chunk} of 1024", shape, 1, taken, alone)[:-1], rate]


def experts(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """K5: a projection of Mixtral's experts."""
    count, top_k, n, k = (2, 1, 128, 128) if INTERPRETED else MIXTRAL
    weight = stack_weights([prepare_weight(random_weight(n, k)) for _ in range(count)])
    for tokens in (1,) if INTERPRETED else (1, 8, 64, 1024):
        x = random_input(tokens, k)
        chosen = torch.stack([torch.randperm(count, device=DEVICE)[:top_k] for _ in range(tokens)])
        prepared = prepare(x, weight)
        block = block_of(chosen.numel(), weight, dtype=DTYPE, device=DEVICE)
        taken = seconds([lambda p=prepared, c=chosen, b=block: expert_gemm(p, weight, align_tokens(c, count, b))])  # type: ignore[misc]
        used = len(chosen.unique())
        moved = stored(weight) * used / count + 2 * tokens * (k + top_k * n)
        yield row(
            "experts, W4A16", f"{count} x {n} x {k}", tokens, taken, found.floor(moved, 2 * chosen.numel() * n * k)
        )


def helpers(found: Machine, shapes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """Hadamard transforms and Gram matrices."""
    widths = (64,) if INTERPRETED else (4096, 8192, 14336)
    tokens = 4 if INTERPRETED else 4096
    for width in widths:
        x = random_input(tokens, width)
        own = Hadamard(size=width)
        taken = seconds([lambda x=x, h=own: transform(x, h)])  # type: ignore[misc]
        yield row("Hadamard", str(width), tokens, taken, found.floor(2 * x.nbytes))
        gram = LowerTriangle.zeros(width, torch.float64, DEVICE).entries
        taken = seconds([lambda g=gram, x=x: add_gram_(g, x)])  # type: ignore[misc]
        dense = seconds([lambda x=x: x.T @ x])  # type: ignore[misc]
        yield row("Gram, lower triangle", str(width), tokens, taken, found.floor(0, tokens * width**2), dense)


def _copy(weight: PackedWeight) -> PackedWeight:
    return replace(weight, planes=tuple(plane.clone() for plane in weight.planes), scale=weight.scale.clone())


TABLES = {
    "gemv": gemv,
    "gemm": gemm,
    "branch": branch,
    "input": inputs,
    "residual": residual,
    "experts": experts,
    "helpers": helpers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--minutes", type=float, default=8.0, help="stop with what there is after so long")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke != INTERPRETED or (arguments.smoke and arguments.record):
        parser.error("--smoke: expected with TRITON_INTERPRET=1, and only there; its times are no figures")
    started = time.perf_counter()
    found = measured()
    shapes = SMOKE if arguments.smoke else SHAPES
    rows: list[Row] = []
    for name in arguments.tables.split(","):
        for line in TABLES[name](found, shapes):
            rows.append(line)
            print(*line, sep="  ", flush=True)
            if time.perf_counter() - started > 60 * arguments.minutes:
                break
    body = table(HEADER, rows)
    body += f"\n\nCopy {found.bandwidth / 1e12:.2f} TB/s, product {found.rate / 1e12:.0f} TFLOP/s, in the same run."
    if arguments.smoke:
        print("it runs")
        return
    print(body)
    if arguments.record:
        about = f"{torch.cuda.get_device_name()}; {machine()}. {versions('torch', 'triton')}."
        print(record("kernels", "Inference kernels", body, about))


if __name__ == "__main__":
    main()
