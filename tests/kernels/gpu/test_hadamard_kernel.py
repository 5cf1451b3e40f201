"""The kernel's transform is `Hadamard.apply`, for every way in which an order can be made and a row can be cut into tiles."""

from __future__ import annotations

import pytest
import torch

from counterweight.kernels.gpu.hadamard import _passes, transform
from counterweight.kernels.hadamard import Hadamard
from tests.kernels.gpu.guarded import bands_are_intact, guarded
from tests.kernels.gpu.poisoned import poisoned

TRANSFORMS = {
    "one channel": Hadamard(size=1),
    "signs alone": Hadamard(size=7, seed=3),
    "power of two": Hadamard(size=64),
    "signs": Hadamard(size=128, seed=1),
    "rows beyond a tile": Hadamard(size=8192, seed=1),
    "core alone, blocks": Hadamard(size=7 * 12, seed=2),
    "core and doublings": Hadamard(size=28 * 16, seed=2),
    "core II": Hadamard(size=36 * 2),
    "core of several steps": Hadamard(size=76 * 2, seed=5),
    "blocks of a power of two": Hadamard(size=92),
    "signs that tiles share": Hadamard(size=48, seed=4),
    "heads": Hadamard(size=8, inner=24, seed=1),
    "core across heads": Hadamard(size=12, inner=20, seed=1),
    "blocks of heads": Hadamard(size=20 * 23, inner=3),
}
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def compare(x: torch.Tensor, hadamard: Hadamard) -> None:
    """The transform of x against the exact one, up to one rounding to x's dtype and to that of float32 sums."""
    x = guarded(x)
    with poisoned():
        y = transform(x, hadamard)
    assert y.dtype is x.dtype
    assert bands_are_intact(x)
    exact = hadamard.apply(x.cpu().double())
    torch.testing.assert_close(y.cpu().double(), exact, rtol=TOLERANCES[x.dtype], atol=2e-6)


@pytest.mark.parametrize("hadamard", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_transform_is_the_product_with_the_matrix(hadamard: Hadamard, tokens: int, device: torch.device) -> None:
    compare(random(tokens, hadamard.width).to(device), hadamard)


@pytest.mark.parametrize("name", ["power of two", "core alone, blocks", "heads", "blocks of heads"])
def test_nothing_is_written_for_what_follows_the_last_token(name: str, device: torch.device) -> None:
    """Where x is followed by numbers: those of a band, NaN, would turn into the NaN that a result's band should hold."""
    hadamard = TRANSFORMS[name]
    x = random(300, hadamard.width).to(device)
    with poisoned():
        transform(x[:3], hadamard)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["signs", "core and doublings", "core across heads"])
def test_halves_are_rounded_once(name: str, dtype: torch.dtype, device: torch.device) -> None:
    hadamard = TRANSFORMS[name]
    compare(random(3, hadamard.width).to(device, dtype), hadamard)


@pytest.mark.parametrize(
    ("hadamard", "passes"),
    [(Hadamard(size=32768, seed=1), 1), (Hadamard(size=65536, seed=1), 2), (Hadamard(size=36 * 1024, seed=1), 2)],
    ids=["largest tile", "two passes of doublings", "core, then doublings"],
)
def test_rows_larger_than_a_tile_take_passes(hadamard: Hadamard, passes: int, device: torch.device) -> None:
    assert len(_passes(hadamard)) == passes
    compare(random(2, hadamard.width).to(device, torch.float16), hadamard)


def test_each_option_counts(device: torch.device) -> None:
    x = random(2, 96).to(device)
    results = [transform(x, h) for h in (Hadamard(size=96), Hadamard(size=96, seed=0), Hadamard(size=48, inner=2))]
    assert not any(torch.allclose(a, b) for a, b in [results[:2], results[1:], results[::2]])


def test_no_token_is_no_work(device: torch.device) -> None:
    assert transform(torch.empty(0, 64, device=device), Hadamard(size=64)).shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.zeros(2, 63), r"x: \[2, 63\].*expected \[tokens, 64\]"),
        (torch.zeros(64), r"x: \[64\]"),
        (torch.zeros(64, 2).T, "contiguous"),
        (torch.zeros(2, 64, dtype=torch.float64), "dtype: torch.float64"),
    ],
    ids=["width", "dimensions", "layout", "dtype"],
)
def test_other_inputs_are_refused(x: torch.Tensor, what: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=what):
        transform(x.to(device), Hadamard(size=64))
