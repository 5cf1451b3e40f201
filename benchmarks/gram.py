"""Time of one shard's Gram product on one core: the whole matrix, and strips of its lower triangle.

    python benchmarks/gram.py [--tokens 4096] [--widths 256 768 1024]

Chooses `TRIANGLE_BLOCK` in `workers/calibration/triangle.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from common import machine, table
from torch import Tensor

STRIPS = (64, 128, 192, 256, 384)


def strips(x: Tensor, block: int) -> Tensor:
    """The lower triangle of x^T x, `block` rows at a time."""
    width = x.shape[1]
    out = torch.zeros(width, width)
    for start in range(0, width, block):
        stop = min(start + block, width)
        torch.mm(x[:, start:stop].T, x[:, :stop], out=out[start:stop, :stop])
    return out


def best(call: Callable[[], object], repeats: int = 8) -> float:
    """Least milliseconds of several calls."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in arguments.widths:
        x = torch.randn(arguments.tokens, width)
        whole = best(partial(torch.matmul, x.T, x))
        cells = [f"{best(partial(strips, x, block)):.1f}" for block in STRIPS]
        rows.append([str(width), f"{whole:.1f}", *cells])
    print(machine())
    print(f"milliseconds for {arguments.tokens} tokens, float32, one thread")
    print(table(["width", "whole", *(f"strips of {block}" for block in STRIPS)], rows))


if __name__ == "__main__":
    main()
