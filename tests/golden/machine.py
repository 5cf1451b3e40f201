"""Whose bits: the processor's instructions, the libraries, and a fingerprint of what both compute.

A processor's name does not say which kernels torch, MKL and oneDNN choose on it, nor do environment variables that change the
choice. So the operations that compression is made of are run on fixed numbers, and the bits of their results are digested:
two machines that agree on all of them agree on stored tensors too.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.workers.checkpoint.digest import tensor_digest
from tests.golden.sources import exact


@dataclass(frozen=True, kw_only=True)
class Machine:
    """capability: of torch's own kernels, such as AVX512. fingerprint: hex, of the bits of common operations."""

    capability: str
    torch: str
    transformers: str
    fingerprint: str

    @property
    def name(self) -> str:
        """Stem of the file with this machine's digests."""
        libraries = f"torch-{self.torch}-transformers-{self.transformers}"
        return f"{self.capability.lower()}-{libraries}-{self.fingerprint[:12]}"


@cache
def this_machine() -> Machine:
    """The machine that this process runs on, under the environment that it runs in."""
    return Machine(
        capability=torch.backends.cpu.get_cpu_capability(),
        torch=metadata.version("torch").partition("+")[0],
        transformers=metadata.version("transformers"),
        fingerprint=_fingerprint(),
    )


def _fingerprint() -> str:
    """sha256 (hex) of the results of `_operations` in one thread, as a worker computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            digests = [tensor_digest(result.contiguous()) for result in _operations()]
    finally:
        torch.set_num_threads(threads)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _operations() -> Iterator[Tensor]:
    """Products, factorizations, functions, sums and attention, in the shapes and dtypes of the recipes' models."""
    draw = random.Random("machine")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for tokens, width, rows in ((512, 64, 64), (512, 192, 64), (512, 64, 192), (200, 96, 64), (8192, 64, 64)):
            x, weight = exact(draw, tokens, width).to(dtype), exact(draw, rows, width).to(dtype)
            yield functional.linear(x, weight)
            yield x.T @ x
        x = exact(draw, 512, 192).to(dtype) * 4
        yield from (x.sum(0), x.sum(-1), x.sum(), x.square().mean(-1), x.norm(dim=1), x.cumsum(0), x.softmax(-1))
        yield from (x.exp(), x.sigmoid(), x.cos(), x.sin(), functional.silu(x), x.abs().log(), x.abs().pow(2.4))
        yield from (x.abs().sqrt(), x.abs().rsqrt(), x[0] / x[1], x.to(torch.bfloat16).to(dtype))
        query, key, value = exact(draw, 3, 16, 4, 32, 16).to(dtype)
        yield functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    for tokens, width in ((512, 64), (512, 96), (512, 192), (40, 64)):
        x = exact(draw, tokens, width).double()
        gram = x.T @ x
        root, _ = torch.linalg.cholesky_ex(gram + torch.eye(width, dtype=gram.dtype))
        yield from (root, torch.cholesky_inverse(root), torch.cholesky_solve(gram, root))
        yield torch.linalg.solve_triangular(root, gram, upper=False)
        yield from torch.linalg.eigh(gram)
        yield torch.linalg.qr(x.T[:, : min(tokens, width)]).Q
        yield from torch.linalg.svd(x[:64].float(), full_matrices=False)
