"""All experts in one launch against each expert's own torch layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.backend import experts_on_kernels
from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.mixture import KernelExperts, unsupported
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.weights.uniform import UniformWeight

EXPERTS, HIDDEN, INNER = 3, 64, 32


def random(device: torch.device, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def linear(device: torch.device, rows: int, columns: int, seed: int, **parts: Any) -> CompensatedLinear:
    codes = (3 * random(device, rows, columns, seed=seed)).round().clamp(-8, 7).to(torch.int8)
    scale = 0.01 + 0.01 * random(device, rows, 1, seed=seed + 1).abs()
    weight = UniformWeight(codes=codes, scale=scale, zero_point=None, bits=4, group_size=None)
    rank = parts.pop("rank", 0)
    branch = None
    if rank:
        branch = LowRank(
            up=0.05 * random(device, rows, rank, seed=seed + 2), down=0.2 * random(device, rank, columns, seed=seed + 3)
        )
    return CompensatedLinear(weight, low_rank=branch, **parts)


def mixture(device: torch.device, **parts: Any) -> list[dict[str, CompensatedLinear]]:
    """Experts of which the second has a smaller branch than the others, and the third none."""
    ranks = parts.pop("ranks", (0, 0, 0))
    transform = parts.pop("transform", None)
    biased = parts.pop("biased", False)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return [
        {
            name: linear(
                device,
                *shape,
                seed=100 * expert + 10 * place,
                rank=ranks[expert],
                transform=transform if name == "down_proj" else None,
                bias=random(device, shape[0], seed=100 * expert + 10 * place + 9) if biased else None,
                **parts,
            )
            for place, (name, shape) in enumerate(shapes.items())
        }
        for expert in range(EXPERTS)
    ]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    return (up.clamp(-0.5, 0.5) + 1) * functional.silu(gate.clamp(max=0.5))


def one_by_one(
    experts: list[dict[str, CompensatedLinear]],
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = gated,
) -> Tensor:
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for place in range(chosen.shape[1]):
            own = experts[int(chosen[token, place])]
            row = x[token : token + 1]
            inner = product(own["gate_proj"](row), own["up_proj"](row))
            y[token] += weights[token, place] * own["down_proj"](inner)[0]
    return y


PARTS: dict[str, dict[str, Any]] = {
    "codes alone": {},
    "branches": {"ranks": (5, 2, 0)},
    "activations": {"activations": ActivationFormat(bits=8)},
    "transform": {"transform": Hadamard(size=32, seed=1)},
    "biases": {"biased": True},
    "biases and branches": {"biased": True, "ranks": (5, 2, 0), "activations": ActivationFormat(bits=8)},
}


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("part", PARTS)
def test_together_they_compute_what_each_does(part: str, tokens: int, device: torch.device) -> None:
    experts = mixture(device, **PARTS[part])
    x = random(device, tokens, HIDDEN, seed=7)
    source = torch.Generator().manual_seed(8)
    # The last expert gets no token.
    chosen = torch.stack([torch.randperm(2, generator=source) for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, 2, generator=source).to(device)
    found = KernelExperts(experts, gated)(x, chosen, weights)
    torch.testing.assert_close(found, one_by_one(experts, x, chosen, weights), rtol=1e-4, atol=1e-4)
    if part != "codes alone":
        plain = KernelExperts(mixture(device), gated)(x, chosen, weights)
        assert (found - plain).abs().max() > 1e-3, f"{part} does nothing"


def test_a_product_that_is_not_linear_in_up(device: torch.device) -> None:
    experts = mixture(device, biased=True)
    x = random(device, 6, HIDDEN, seed=7)
    chosen, weights = torch.tensor([[0, 1]] * 6, device=device), torch.full((6, 2), 0.5, device=device)
    found = KernelExperts(experts, clamped)(x, chosen, weights)
    torch.testing.assert_close(found, one_by_one(experts, x, chosen, weights, clamped), rtol=1e-4, atol=1e-4)
    assert (found - KernelExperts(experts, gated)(x, chosen, weights)).abs().max() > 1e-2


def test_experts_that_differ_are_left_apart(device: torch.device) -> None:
    experts = mixture(device)
    assert isinstance(experts_on_kernels(experts, gated, "triton"), KernelExperts)
    assert experts_on_kernels(experts, gated, "torch") is None
    experts[1]["up_proj"] = linear(device, INNER, HIDDEN, seed=5, activations=ActivationFormat(bits=8))
    assert "expert 1: up_proj: " in (unsupported(experts) or "")
    assert experts_on_kernels(experts, gated, "triton") is None
    with pytest.raises(ValueError, match="expert 1: up_proj: "):
        KernelExperts(experts, gated)
    experts = mixture(device)
    experts[2] = mixture(device, biased=True)[2]
    assert unsupported(experts) == "gate_proj: some experts with a bias: expected all or none"
