"""Prepared inputs have the reference's codes to the bit, in the order of the weight that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.activations import prepare, unsupported
from counterweight.kernels.gpu.integer_gemm import IntegerWeight, prepare_integer
from counterweight.kernels.gpu.layout import PackedWeight, PreparedInput, prepare_weight
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import quantize_activations
from counterweight.kernels.weights.uniform import UniformWeight
from tests.kernels.gpu.expected import layer_input
from tests.kernels.gpu.guarded import bands_are_intact, guarded
from tests.kernels.gpu.poisoned import poisoned

A8 = ActivationFormat(bits=8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(columns: int, *, bits: int = 4, group_size: int | None = 32, asymmetric: bool = False) -> UniformWeight:
    groups = 1 if group_size is None else columns // group_size
    zero_point = torch.ones(8, groups, dtype=torch.int8) if asymmetric else None
    codes = torch.zeros(8, columns, dtype=torch.int8)
    return UniformWeight(
        codes=codes, scale=torch.ones(8, groups), zero_point=zero_point, bits=bits, group_size=group_size
    )


def prepared(x: Tensor, weight: PackedWeight | IntegerWeight, device: torch.device, **options: Any) -> PreparedInput:
    """`prepare` on tensors between bands of poison, with results full of it."""

    def placed(value: Any) -> Any:
        return guarded(value.to(device)) if isinstance(value, Tensor) else value

    if "norm" in options:
        options["norm"] = (placed(options["norm"][0]), options["norm"][1])
    moved = guarded(x.to(device))
    with poisoned():
        result = prepare(moved, weight, **{name: placed(value) for name, value in options.items()})
    assert bands_are_intact(moved)
    return result


def difficult_tokens(columns: int) -> Tensor:
    """Tokens where a code is easily one off: ties, signs, zeros, the least and the largest values, and ordinary ones."""
    ties = torch.arange(columns) % 256 - 127.5
    ties[0] = -127.5
    tiny = torch.full((columns,), 6e-8)
    tiny[1::2] = 1e-6
    return torch.stack([ties, -ties, torch.zeros(columns), tiny, random(columns) * 6e4 / 5, random(columns, seed=1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("clip", [1.0, 0.83])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("few", [False, True], ids=["tokens", "one token"])
@pytest.mark.parametrize("integer", [False, True], ids=["weight kernel", "integer kernel"])
def test_codes_are_the_reference_s(
    dtype: torch.dtype, bits: int, clip: float, rank: int, few: bool, integer: bool, device: torch.device
) -> None:
    x = difficult_tokens(288).to(dtype)[: 1 if few else None]
    weight = weight_of(288, bits=8)
    result = prepared(
        x,
        prepare_integer(weight) if integer else prepare_weight(weight),
        device,
        activations=ActivationFormat(bits=bits, clip=clip),
        **({"down": random(rank, 288).to(dtype)} if rank else {}),
    )
    codes, step = quantize_activations(x, bits, clip=clip)
    assert result.step is not None
    assert result.values.dtype is (torch.int8 if integer else dtype)
    assert torch.equal(result.values.cpu().double(), codes.double())
    assert torch.equal(result.step.cpu(), step.float().squeeze(1))


def test_sums_of_codes_are_exact(device: torch.device) -> None:
    x = random(5, 384)
    result = prepared(x, prepare_integer(weight_of(384, group_size=128, asymmetric=True)), device, activations=A8)
    codes, _ = quantize_activations(x, 8)
    assert result.sums is not None
    assert torch.equal(result.sums.cpu(), codes.unflatten(1, (3, 128)).sum(2))


def test_a_symmetric_weight_of_integers_needs_no_sums(device: torch.device) -> None:
    assert prepared(random(2, 64), prepare_integer(weight_of(64)), device, activations=A8).sums is None


@pytest.mark.parametrize("tokens", [1, 40])
def test_what_needs_nothing_is_not_copied(tokens: int, device: torch.device) -> None:
    weight = prepare_weight(weight_of(96))
    x = random(tokens, 96).to(device)
    result = prepare(x, weight)
    assert result.values is x
    assert (result.sums, result.step, result.projected) == (None, None, None)
    result = prepared(x.cpu(), weight, device, activations=A8)
    assert torch.equal(result.values.cpu(), quantize_activations(x.cpu(), 8)[0])


@pytest.mark.parametrize("activations", [None, A8])
def test_no_tokens_no_work(activations: ActivationFormat | None, device: torch.device) -> None:
    x = torch.zeros(0, 96, device=device)
    result = prepare(x, prepare_weight(weight_of(96)), activations=activations, down=random(3, 96).to(device))
    assert result.values.shape == (0, 96)
    assert result.projected is not None
    assert result.projected.shape == (0, 3)


@pytest.mark.parametrize("tokens", [1, 5, 33, 70])
@pytest.mark.parametrize("rank", [1, 70])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_projection_is_of_the_unquantized_input(
    tokens: int, rank: int, quantized: bool, device: torch.device
) -> None:
    x, down = random(tokens, 288), random(rank, 288, seed=1)
    result = prepared(
        x,
        prepare_weight(weight_of(288)),
        device,
        down=down,
        activations=ActivationFormat(bits=4) if quantized else None,
    )
    assert result.projected is not None
    torch.testing.assert_close(result.projected.cpu().double(), x.double() @ down.double().T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("columns", [64, 288])
def test_codes_of_factors_are_multiplied_by_their_step(tokens: int, columns: int, device: torch.device) -> None:
    """64 columns are one slice, 288 are several that are added: the step must not be forgotten in either."""
    x = random(tokens, columns)
    down = torch.randint(-127, 128, (9, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    step = torch.linspace(0.001, 0.02, 9)
    result = prepared(x, prepare_weight(weight_of(columns)), device, down=down, step=step)
    assert result.projected is not None
    expected = x.double() @ down.double().T * step.double()
    torch.testing.assert_close(result.projected.cpu().double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 40, 70])
@pytest.mark.parametrize("options", ["norm", "smooth", "norm smooth", "hadamard", "norm smooth hadamard"])
def test_what_precedes_quantization(tokens: int, options: str, device: torch.device) -> None:
    columns, chosen = 160, options.split()
    x, down = 3 * random(tokens, columns), random(4, columns, seed=1)
    before: dict[str, Any] = {}
    if "norm" in chosen:
        before["norm"] = (random(columns, seed=2), 0.1)
    if "smooth" in chosen:
        before["smooth"] = 1 + random(columns, seed=3).abs()
    if "hadamard" in chosen:
        before["hadamard"] = Hadamard(size=columns, seed=1)
    weight = prepare_integer(weight_of(columns, bits=8))
    result = prepared(x, weight, device, activations=A8, down=down, **before)
    expected = layer_input(x, **before)
    codes, step = quantize_activations(expected, 8)
    assert result.step is not None
    assert result.projected is not None
    # Sums have another order here: the last bit of a norm may differ, and then a code that was nearly a tie.
    torch.testing.assert_close(result.step.cpu(), step.squeeze(1), rtol=1e-6, atol=0)
    wrong = result.values.cpu().float() - codes
    assert wrong.abs().max() <= 1
    assert wrong.count_nonzero() <= codes.numel() / 1000
    torch.testing.assert_close(
        result.projected.cpu().double(),
        expected.double() @ down.double().T,
        rtol=0,
        atol=1e-4 * float(expected.abs().max()),
    )


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_norm_alone_is_applied_and_rounded_as_in_transformers(tokens: int, device: torch.device) -> None:
    x, norm = random(tokens, 96).half(), (random(96, seed=1).half(), 1e-5)
    result = prepared(x, prepare_weight(weight_of(96, bits=8)), device, norm=norm)
    expected = layer_input(x, norm=norm)
    wrong = (result.values.cpu()[:, :96] != expected).double().mean()
    assert wrong <= 1e-3  # rounding once instead of twice would differ in a tenth of the values
    torch.testing.assert_close(result.values.cpu()[:, :96], expected, rtol=2**-9, atol=1e-6)


def test_bfloat16(device: torch.device) -> None:
    x, down = random(5, 288).bfloat16(), random(7, 288, seed=1).bfloat16()
    result = prepared(x, prepare_integer(weight_of(288, bits=8)), device, activations=A8, down=down)
    codes, step = quantize_activations(x, 8)
    assert result.step is not None
    assert result.projected is not None
    torch.testing.assert_close(result.step.cpu(), step.float().squeeze(1), rtol=2**-7, atol=0)
    assert (result.values.cpu().float() - codes.float()).abs().max() <= 1  # x / step has 8 bits
    torch.testing.assert_close(result.projected.cpu().double(), x.double() @ down.double().T, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_tokens_that_are_not_finite_are_marked_and_no_others(device: torch.device) -> None:
    x = random(4, 96)
    x[1, 5], x[2, 90] = torch.nan, -torch.inf
    result = prepared(x, prepare_integer(weight_of(96, bits=8)), device, activations=A8)
    assert result.step is not None
    assert result.step.isnan().tolist() == [False, True, True, False]
    codes, _ = quantize_activations(x, 8)
    assert torch.equal(result.values.cpu()[::3].float(), codes[::3])


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_twice_the_same_bits(tokens: int, device: torch.device) -> None:
    x, down, weight = random(tokens, 416), random(20, 416, seed=1), prepare_weight(weight_of(416))
    first, second = (prepared(x, weight, device, down=down, activations=A8) for _ in range(2))
    for name in ("values", "step", "projected"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (ActivationFormat(bits=8, group_size=128), "activations.group_size: 128"),
        (ActivationFormat(bits=16), "activations.bits: 16"),
    ],
)
def test_other_formats_are_refused(format: ActivationFormat, reason: str, device: torch.device) -> None:
    assert reason in str(unsupported(format))
    assert unsupported(A8) is None
    assert unsupported(None) is None
    with pytest.raises(ValueError, match=reason):
        prepare(random(1, 64).to(device), prepare_weight(weight_of(64)), activations=format)


def test_other_inputs_are_refused(device: torch.device) -> None:
    weight = prepare_weight(weight_of(64))
    x, down = random(2, 64).to(device), random(3, 64).to(device)
    step = torch.ones(3, device=device)
    for bad, options, what in (
        (x[:, :32], {}, r"x: \[2, 32\].*expected \[tokens, 64\]"),
        (random(64, 2).to(device).T, {}, "contiguous"),
        (x.double(), {}, "dtype: torch.float64"),
        (x, {"norm": (down[0].half(), 1e-5)}, "norm: torch.float16"),
        (x, {"smooth": step}, r"smooth: torch.float32 \[3\]"),
        (x, {"down": down[:, :32]}, r"down: \[3, 32\]"),
        (x, {"step": step}, r"step: torch.float32 \[3\]: expected float32 \[rank\], with down"),
        (x, {"down": down, "step": step.half()}, "step: torch.float16"),
    ):
        with pytest.raises(ValueError, match=what):
            prepare(bad, weight, **options)
    with pytest.raises(ValueError, match="activations: none"):
        prepare(x, prepare_integer(weight_of(64)))
