"""Where the floor of LRC's solve lies, by kind of work, and what less precision could take off it: counted, not measured.

    python benchmarks/lrc_floor.py [--widths 1024 4096 14336] [--record]

Square layers, W4 A4, rank 10 %. The rates are those that `solvers.py` measured on one CPU thread, in
results/2026-11-26-solvers.md, and that a plan has of an H200. "in float32": float64 products, and factorizations beyond
GPTQ's with the triangular solves behind them, as much faster as float32 products are: the solves behind a damped metric are
in float32 already, and are counted at the rate of factorizations in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from common import record, table

from counterweight.pipeline.rates import GPUS
from counterweight.workers.arithmetic.solving import solve
from counterweight.workers.matrix_flops import Work
from counterweight.workers.recipe import ModuleRecipe

KINDS = ("products32", "products64", "factorizations", "elementwise")
RATES: Mapping[str, Mapping[str, float]] = {
    "one CPU thread": {"products32": 92.9e9, "products64": 46.7e9, "factorizations": 21.1e9, "elementwise": 8.7e9},
    "H200": {kind: float(getattr(GPUS["H200-141G"], kind)) for kind in KINDS},
}


def work(width: int, compensation: Mapping[str, object]) -> Work:
    """Of one square layer."""
    weights = {"bits": 4, "group_size": None}
    asked = {"weights": weights, "activations": {"bits": 4}, "compensation": compensation}
    return solve(ModuleRecipe.model_validate(asked), [(width, width)], 2.0 * width, streams=2, original=False)


def seconds(found: Work, at: Mapping[str, float]) -> dict[str, float]:
    """Of each kind."""
    return {kind: float(getattr(found, kind)) / rate for kind, rate in at.items()}


def narrow(lrc: Work, gptq: Work, at: Mapping[str, float]) -> float:
    """Seconds of LRC in float32."""
    own = lrc.factorizations - gptq.factorizations
    faster = at["products32"] / at["products64"]
    rest = lrc.elementwise / at["elementwise"] + gptq.factorizations / at["factorizations"]
    return rest + (lrc.products32 + lrc.products64) / at["products32"] + own / (at["factorizations"] * faster)


def body_of(widths: list[int]) -> str:
    rows = []
    for name, at in RATES.items():
        for width in widths:
            gptq, lrc = (
                work(width, {"kind": "none"}),
                work(width, {"kind": "lrc", "rank": {"fraction": 0.1}}),
            )
            base, found = sum(seconds(gptq, at).values()), seconds(lrc, at)
            whole, least = sum(found.values()), narrow(lrc, gptq, at)
            kinds = [f"{found[kind] / whole:.0%}" for kind in KINDS]
            rows.append(
                [
                    name,
                    str(width),
                    f"{base:.3g}",
                    f"{whole:.3g}",
                    f"{whole / base:.2f}",
                    *kinds,
                    f"{least:.3g}",
                    f"{whole / least:.2f}",
                ]
            )
    return table(
        ["rates of", "width", "GPTQ, s", "LRC, s", "times GPTQ", *KINDS, "in float32, s", "times faster"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 14336])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    body = body_of(arguments.widths)
    print(body)
    if arguments.record:
        print(record("lrc-floor", "The floor of LRC's solve by kind of work", body, "Counted, not measured."))


if __name__ == "__main__":
    main()
