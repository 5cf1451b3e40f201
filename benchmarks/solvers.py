"""Solvers at width: each step's time, its floor (operations at this machine's measured rates) and the ratio of the two; experts
in a batch and one by one; and what the counts say of Mixtral-8x7B on a GPU at the rates that a plan has of it.

    python benchmarks/solvers.py [--widths 1024 2048 4096] [--experts 64] [--record]

Everything on one thread, in CPU seconds (wall seconds beside them), in one process, because other work shares the machine.
Widths above those measured are floors times the ratio at the widest measured one: extrapolated, and said so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from common import machine, record, table, versions

from counterweight.pipeline.rates import GPUS
from counterweight.workers.arithmetic.solving import solve as solve_work
from counterweight.workers.calibration.clipping import activation_format
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.matrix_flops import Work
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.solve import LayerState, solve

WEIGHTS = {"bits": 4, "group_size": 128}
LARGER = (8192, 14336)
MIXTRAL = {"layers": 32, "experts": 8, "hidden": 4096, "intermediate": 14336, "key_value": 1024}
KINDS = ("products32", "products64", "factorizations", "elementwise")
H200 = {kind: float(getattr(GPUS["H200-141G"], kind)) for kind in KINDS}
"""Operations per second by kind, as a plan has them."""


@dataclass(frozen=True)
class Seconds:
    cpu: float
    wall: float


def timed(call: Callable[[], object]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Seconds(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def quicker(call: Callable[[], object], repeats: int) -> Seconds:
    """The least of several calls."""
    return min((timed(call) for _ in range(repeats)), key=lambda seconds: seconds.cpu)


def rates(size: int) -> dict[str, float]:
    """Operations per second of each kind on this machine, by torch itself."""
    single = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    double = single.double()
    definite = double @ double.T + size * torch.eye(size, dtype=torch.float64)
    row = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))
    cube = float(size) ** 3

    def passes() -> None:
        for _ in range(1000):
            row.mul_(1.0)

    return {
        "products32": 2 * cube / quicker(lambda: single @ single, 3).cpu,
        "products64": 2 * cube / quicker(lambda: double @ double, 3).cpu,
        "factorizations": cube / 3 / quicker(lambda: torch.linalg.cholesky_ex(definite), 3).cpu,
        "elementwise": 1000 * len(row) / quicker(passes, 3).cpu,
    }


def floor(work: Work, at: Mapping[str, float]) -> float:
    """Seconds of so many operations at these rates."""
    return sum(float(getattr(work, kind)) / rate for kind, rate in at.items())


def recipe(activations: int | None = None, **compensation: object) -> ModuleRecipe:
    asked = compensation or {"kind": "none"}
    inputs = None if activations is None else {"bits": activations}
    return ModuleRecipe.model_validate({"weights": WEIGHTS, "activations": inputs, "compensation": asked})


def recipes(width: int) -> dict[str, ModuleRecipe]:
    """What is compared: name -> recipe. Ranks of 32 and of a tenth."""
    tenth = {"fraction": 0.1}
    few = {"count": min(32, width // 4)}
    return {
        "GPTQ": recipe(),
        "GPTQ + SVD, rank 32": recipe(kind="svd", rank=few),
        "GPTQ + SVD, rank 10 %": recipe(kind="svd", rank=tenth),
        "GPTQ, A4": recipe(4),
        "LRC, A4, rank 10 %": recipe(4, kind="lrc", rank=tenth),
    }


def layer(rows: int, columns: int, activations: int | None, seed: int = 0) -> LayerState:
    """A random weight behind an input with channels of unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns + columns // 4, columns, generator=generator) * torch.rand(columns, generator=generator)
    asked = recipe(activations).activations
    quantizing = None if asked is None else activation_format(asked)
    statistics = InputStatistics.of(x, Gathering(activations=quantizing))
    return LayerState(
        weight=torch.randn(rows, columns, generator=generator) / columns**0.5,
        statistics=statistics,
        scale_dtype=torch.float16,
        factor_dtype=torch.bfloat16,
    )


def work_of(part: ModuleRecipe, shapes: list[tuple[int, int]]) -> Work:
    """A solve of linears that share an input, with their errors."""
    streams = 1 + (part.activations is not None)
    return solve_work(part, shapes, 2.0 * shapes[0][1], streams=streams, original=False)


def solved(part: ModuleRecipe, layers: list[LayerState]) -> None:
    for one in solve(part, layers):
        one.errors()


def at_width(width: int, at: Mapping[str, float]) -> dict[str, tuple[Seconds, float]]:
    """Recipe -> seconds of a solve with its errors, and the floor."""
    found = {}
    for name, part in recipes(width).items():
        one = layer(width, width, None if part.activations is None else part.activations.bits)
        seconds = quicker(partial(solved, part, [one]), 1 if width > 1024 else 2)
        found[name] = (seconds, floor(work_of(part, [(width, width)]), at))
        print(f"{width} {name}: {seconds.cpu:.2f} CPU s, {seconds.wall:.2f} s; floor {found[name][1]:.2f}", flush=True)
    return found


def widths_table(found: Mapping[int, Mapping[str, tuple[Seconds, float]]], at: Mapping[str, float]) -> str:
    rows = []
    for width, results in found.items():
        for name, (seconds, least) in results.items():
            base = results["GPTQ, A4" if "A4" in name else "GPTQ"][0].cpu
            cells = [f"{seconds.cpu:.2f}", f"{seconds.wall:.2f}", f"{least:.2f}", f"{seconds.cpu / least:.2f}"]
            rows.append([str(width), name, *cells, f"{100 * (seconds.cpu / base - 1):+.0f} %"])
    widest = max(found)
    for width in LARGER:
        predicted: dict[str, float] = {}
        for name, part in recipes(width).items():
            seconds, measured = found[widest][name]
            least = floor(work_of(part, [(width, width)]), at)
            predicted[name] = least * seconds.cpu / measured
            over = predicted[name] / predicted["GPTQ, A4" if "A4" in name else "GPTQ"] - 1
            cells = [
                f"({predicted[name]:.0f})",
                "",
                f"{least:.1f}",
                f"({seconds.cpu / measured:.2f})",
                f"({100 * over:+.0f} %)",
            ]
            rows.append([str(width), name, *cells])
    return table(["width", "solve", "CPU s", "wall s", "floor, s", "ratio", "over GPTQ"], rows)


def experts_table(count: int, rows: int, columns: int) -> str:
    """Experts of one shape, one by one and in one batch."""
    lines = []
    for name, part in {"GPTQ": recipe(), "GPTQ + SVD, rank 8": recipe(kind="svd", rank={"count": 8})}.items():
        layers = [layer(rows, columns, None, seed) for seed in range(count)]

        def apart(part: ModuleRecipe = part, layers: list[LayerState] = layers) -> None:
            for one in layers:
                solve(part, [one])

        apart()
        alone, together = quicker(apart, 3), quicker(partial(solve, part, layers), 3)
        cells = [f"{alone.cpu:.3f}", f"{together.cpu:.3f}", f"{alone.cpu / together.cpu:.2f}"]
        lines.append([f"{count} of {rows} x {columns}, {name}", *cells])
    return table(["experts", "one by one, CPU s", "one batch, CPU s", "ratio"], lines)


def mixtral_table() -> str:
    """Solving every linear of Mixtral-8x7B once, from the counts, at the rates of `H200`."""
    hidden, inner, experts = MIXTRAL["hidden"], MIXTRAL["intermediate"], MIXTRAL["experts"]
    attention = [(hidden, hidden), (MIXTRAL["key_value"], hidden), (MIXTRAL["key_value"], hidden)]
    solves = [(attention, 1), ([(hidden, hidden)], 1), ([(inner, hidden)] * 2, experts), ([(hidden, inner)], experts)]
    rows = []
    for name, part in recipes(hidden).items():
        each = [work_of(part, shapes) * (count * MIXTRAL["layers"]) for shapes, count in solves]
        total = sum(each[1:], each[0])
        kinds = [f"{getattr(total, kind) / rate:.0f}" for kind, rate in H200.items()]
        rows.append([name, *kinds, f"{floor(total, H200):.0f}"])
    return table(["Mixtral-8x7B", *(f"{kind}, s" for kind in H200), "sum, s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--expert-shape", type=int, nargs=2, default=[256, 128])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = f"{machine()}, one thread. {versions('torch')}."
    experts = experts_table(arguments.experts, *arguments.expert_shape)
    print(experts, flush=True)
    at = rates(max(arguments.widths) // 2)
    found = {width: at_width(width, at) for width in arguments.widths}
    measured = ", ".join(f"{kind} {rate / 1e9:.1f}" for kind, rate in at.items())
    taken = ", ".join(f"{kind} {rate / 1e12:.1f}" for kind, rate in H200.items())
    body = "\n\n".join(
        [
            experts,
            f"Measured rates, 1e9 operations per second: {measured}.",
            widths_table(found, at),
            "In brackets: extrapolated, the floor times the ratio at the widest measured width.",
            f"Predicted, not measured. One H200; rates that are inputs, 1e12 operations per second: {taken}.",
            mixtral_table(),
        ]
    )
    print(body)
    if arguments.record:
        print(record("solvers", "Solvers at width", body, about))


if __name__ == "__main__":
    main()
