"""Mixture of experts: routing counted by hand, products against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.gpu.experts import Routing, align_tokens, block_of, expert_gemm, project_experts
from counterweight.kernels.gpu.layout import PackedWeight, prepare_weight, stack_weights
from counterweight.kernels.reference import experts as reference_experts
from counterweight.kernels.weights.uniform import UniformWeight
from tests.kernels.gpu.guarded import guarded
from tests.kernels.gpu.poisoned import poisoned
from tests.kernels.gpu.prepared import prepare, random_input, random_low_rank, random_weight, relative_error

EXPERTS = 5

ROUTES = {
    "one token, two experts": torch.tensor([[3, 1]]),
    "an empty expert, one with more than a block": torch.tensor([[2]] * 10 + [[0], [4], [2]]),
    "two of five each": torch.tensor([[0, 1], [1, 4], [4, 0], [1, 0], [4, 1], [0, 4], [1, 0]]),
}


@pytest.fixture(autouse=True)
def outputs() -> Iterator[list[Tensor]]:
    """What is allocated is full of NaN and between guard bands, which are intact in the end."""
    with poisoned(needed=False) as allocated:
        yield allocated


def make_weights(
    device: torch.device,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[UniformWeight], PackedWeight]:
    """Weights [130, 200] of EXPERTS experts, and all of them as one."""
    weights = [
        random_weight(seed, 130, 200, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype).to(device)
        for seed in range(EXPERTS)
    ]
    stacked = stack_weights([prepare_weight(weight) for weight in weights])
    planes = tuple(guarded(plane) for plane in stacked.planes)
    offset = None if stacked.offset is None else guarded(stacked.offset)
    return weights, replace(stacked, planes=planes, scale=guarded(stacked.scale), offset=offset)


def route(expert_of: Tensor, weight: PackedWeight, *, decoding: bool, dtype: torch.dtype) -> Routing:
    """The routing that `expert_gemm` wants."""
    device = weight.scale.device
    block = block_of(expert_of.numel(), weight, dtype=dtype, device=device, decoding=decoding)
    return align_tokens(expert_of.to(device), EXPERTS, block)


@pytest.mark.parametrize("expert_of", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("block", [2, 8])
def test_each_slot_is_in_one_block_of_its_expert(device: torch.device, expert_of: Tensor, block: int) -> None:
    routing = align_tokens(expert_of.to(device), EXPERTS, block)
    count = expert_of.numel()
    places = routing.slots.cpu().reshape(-1, block)
    experts = routing.expert_of_block.cpu()
    found = places[places < count]
    assert sorted(found.tolist()) == list(range(count))
    used = experts < EXPERTS
    assert (places[~used] == count).all()
    for slots, expert in zip(places[used], experts[used], strict=True):
        assert (expert_of.reshape(-1)[slots[slots < count].long()] == expert).all()
    needed = sum(-(-int((expert_of == expert).sum()) // block) for expert in range(EXPERTS))
    assert int(used.sum()) == needed


@pytest.mark.parametrize("seed", range(4))
def test_blocks_suffice_for_any_routing(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for tokens, top_k, experts, block in [(1, 2, 8, 8), (33, 2, 8, 8), (50, 4, 60, 16), (7, 1, 3, 8), (64, 2, 2, 8)]:
        expert_of = torch.randint(0, experts, (tokens, top_k), generator=random)
        routing = align_tokens(expert_of, experts, block)
        assert int((routing.slots < tokens * top_k).sum()) == tokens * top_k


@pytest.mark.parametrize("expert_of", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 128, True), (4, None, False), (3, 64, False), (8, None, True)]
)
@pytest.mark.parametrize("decoding", [True, False])
def test_equals_the_reference(
    device: torch.device, decoding: bool, bits: int, group_size: int | None, symmetric: bool, expert_of: Tensor
) -> None:
    weights, packed = make_weights(device, bits=bits, group_size=group_size, symmetric=symmetric)
    routing = route(expert_of, packed, decoding=decoding, dtype=torch.float32)
    x = random_input(20, expert_of.shape[0], 200, torch.float32).to(device)
    y = expert_gemm(prepare(x), packed, routing)
    assert relative_error(y, reference_experts(x, weights, expert_of.to(device))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_in_decoding(device: torch.device, dtype: torch.dtype) -> None:
    weights, packed = make_weights(device, dtype=dtype)
    expert_of = ROUTES["two of five each"]
    routing = route(expert_of, packed, decoding=True, dtype=dtype)
    x = random_input(21, 7, 200, dtype).to(device)
    y = expert_gemm(prepare(x), packed, routing, out_dtype=torch.float32)
    assert relative_error(y, reference_experts(x, weights, expert_of.to(device))) < 1e-5


@pytest.mark.parametrize("factors", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("decoding", [True, False])
def test_low_rank_bias_and_gates(device: torch.device, decoding: bool, splits: int, factors: torch.dtype) -> None:
    weights, packed = make_weights(device)
    expert_of = ROUTES["two of five each"].to(device)
    routing = route(expert_of, packed, decoding=decoding, dtype=torch.float32)
    x = random_input(22, 7, 200, torch.float32).to(device)
    low_ranks = [random_low_rank(30 + expert, 130, 200, 37, factors).to(device) for expert in range(EXPERTS)]
    gates = torch.linspace(0.2, 1.4, 14, device=device).reshape(7, 2)
    bias = torch.linspace(-2, 2, EXPERTS * 130, device=device).reshape(EXPERTS, 130)
    projection = project_experts(
        guarded(x), guarded(torch.stack([branch.down for branch in low_ranks])), routing, steps=steps_of(low_ranks)
    )
    y = expert_gemm(
        prepare(x, projection=projection),
        packed,
        routing,
        up=guarded(torch.stack([branch.up for branch in low_ranks])),
        bias=guarded(bias),
        gates=guarded(gates),
        splits=splits,
    )
    branches: list[LowRank | None] = list(low_ranks)
    biases = bias[expert_of].double()
    expected = reference_experts(x, weights, expert_of, low_ranks=branches) + biases
    assert relative_error(y, expected * gates.unsqueeze(2).double()) < 1e-5
    assert relative_error(y, expected) > 1e-2
    without = (reference_experts(x, weights, expert_of) + biases) * gates.unsqueeze(2).double()
    assert relative_error(y, without) > 1e-2


def steps_of(low_ranks: list[LowRank]) -> Tensor | None:
    """[experts, rank] steps of both factors, None of factors without."""
    products = [b.up_scale * b.down_scale for b in low_ranks if b.up_scale is not None and b.down_scale is not None]
    return torch.stack(products) if products else None


def test_an_input_for_each_slot(device: torch.device) -> None:
    weights, packed = make_weights(device)
    expert_of = ROUTES["two of five each"].to(device)
    routing = route(expert_of, packed, decoding=True, dtype=torch.float32)
    x = random_input(23, 14, 200, torch.float32).to(device)
    down = torch.stack([random_low_rank(expert, 130, 200, 5, torch.float32).down for expert in range(EXPERTS)])
    own = x.reshape(7, 2, 200)
    y = expert_gemm(prepare(x), packed, routing)
    assert relative_error(y, reference_experts(own, weights, expert_of)) < 1e-5
    projection = project_experts(x, down.to(device), routing)
    expected = torch.einsum("tki,tkri->tkr", own.double(), down.to(device)[expert_of].double())
    assert relative_error(projection.reshape(7, 2, 5), expected) < 1e-5


def test_step_is_of_the_token(device: torch.device) -> None:
    weights, packed = make_weights(device)
    expert_of = ROUTES["two of five each"].to(device)
    routing = route(expert_of, packed, decoding=True, dtype=torch.float32)
    x = (random_input(24, 7, 200, torch.float32) * torch.arange(1, 8).unsqueeze(1)).to(device)
    prepared = prepare(x, bits=8)
    assert prepared.step is not None
    y = expert_gemm(prepared, packed, routing)
    codes = (x / prepared.step.unsqueeze(1)).round().clamp(-128, 127)
    expected = reference_experts(codes, weights, expert_of) * prepared.step.reshape(7, 1, 1).double()
    assert relative_error(y, expected) < 1e-5


def test_no_tokens(device: torch.device) -> None:
    _, packed = make_weights(device)
    routing = align_tokens(torch.zeros(0, 2, dtype=torch.long, device=device), EXPERTS, 8)
    x = prepare(torch.zeros(0, 200, device=device))
    assert expert_gemm(x, packed, routing).shape == (0, 2, 130)


def test_refuses_what_does_not_go_together(device: torch.device) -> None:
    _, packed = make_weights(device)
    expert_of = ROUTES["two of five each"].to(device)
    routing = align_tokens(expert_of, EXPERTS, 8)
    x = prepare(random_input(25, 7, 200, torch.float32).to(device))
    for call, message in [
        (lambda: expert_gemm(x, packed, align_tokens(expert_of, EXPERTS, 4)), "routing: block 4: expected one of"),
        (lambda: expert_gemm(x, packed, align_tokens(expert_of, 6, 8)), "weight: of 5 experts: expected 6"),
        (lambda: expert_gemm(x, packed, align_tokens(expert_of[:3], EXPERTS, 8)), "values: 7 rows"),
        (lambda: expert_gemm(x, packed, routing, gates=torch.ones(7, device=device)), "gates: "),
        (lambda: project_experts(x.values, torch.ones(4, 3, 256, device=device), routing), "down: "),
        (lambda: project_experts(x.values[:4], torch.ones(5, 3, 256, device=device), routing), "x: "),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
