"""The lower triangle of x^T x against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import ActivationFormat
from counterweight.kernels.gpu.gram import add_gram_, add_product_
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from tests.kernels.gpu.expected import lower_gram
from tests.kernels.gpu.guarded import bands_are_intact, guarded


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [
        (70, 130, torch.float16),
        (1, 40, torch.float16),
        (64, 256, torch.bfloat16),
        (33, 70, torch.float32),
        (64, 64, torch.float32),
    ],
)
def test_adds_the_lower_triangle_and_leaves_the_upper(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = guarded(random(tokens, width).to(dtype).to(device))
    before = random(width, width, seed=1).to(device)
    gram = guarded(before)
    assert add_gram_(gram, x, 0.25) is gram
    expected = before.double() + lower_gram(x, 0.25)
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gram.triu(1), before.triu(1))
    assert bands_are_intact(gram)
    assert torch.equal(add_gram_(guarded(before), x, 0.25), gram)


def test_rows_of_a_wider_tensor_and_scale_one_by_default(device: torch.device) -> None:
    x = random(20, 50).half().to(device)
    gram = torch.zeros(40, 40, device=device)
    add_gram_(gram, x[:, :40])
    torch.testing.assert_close(gram.double(), lower_gram(x[:, :40]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "dtype"),
    [(70, 130, 40, torch.float16), (33, 64, 200, torch.bfloat16), (1, 70, 33, torch.float32)],
)
def test_adds_the_product_of_two_inputs(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = guarded(random(tokens, rows).to(dtype).to(device))
    y = random(tokens, columns + 8, seed=1).to(dtype).to(device)[:, :columns]
    before = random(rows, columns, seed=2).to(device)
    total = guarded(before)
    assert add_product_(total, x, y) is total
    torch.testing.assert_close(total.double(), before.double() + x.double().T @ y.double(), rtol=1e-5, atol=1e-5)
    assert bands_are_intact(total)


def test_two_inputs_are_of_the_same_tokens_in_one_dtype(device: torch.device) -> None:
    x, total = random(4, 8).to(device), torch.zeros(8, 8, device=device)
    for other in (x[:3], x.half(), x.T):
        with pytest.raises(ValueError, match="y: "):
            add_product_(total, x, other)


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    x, gram = random(4, 8).to(device), torch.zeros(8, 8, device=device)
    with pytest.raises(ValueError, match="x: "):
        add_gram_(gram, x.T)
    with pytest.raises(ValueError, match="x: "):
        add_gram_(gram, x[0])
    with pytest.raises(ValueError, match=r"dtype: torch\.float64"):
        add_gram_(gram, x.double())
    for other in (gram[:7, :7], gram.double(), torch.zeros(8, 9, device=device)[:, :8]):
        with pytest.raises(ValueError, match="gram: "):
            add_gram_(other, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_gathered_where_kernels_run_are_those_gathered_elsewhere(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random(3, 20, 40).to(dtype).to(device)
    gathering = Gathering(activations=ActivationFormat(bits=8), absolute=True)
    original = random(60, 40, seed=2).to(dtype).to(device)

    def moments(*, kernels: bool) -> InputStatistics:
        monkeypatch.setattr("counterweight.workers.calibration.statistics.runs_kernels", lambda _: kernels)
        accumulator = Accumulator(40, device, gathering)
        accumulator.add(ShardMoments.of(rows, gathering, original))
        return accumulator.result()

    calls: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(
        "counterweight.kernels.gpu.gram.add_gram_", lambda gram, x: calls.append(x) or add_gram_(gram, x)
    )
    monkeypatch.setattr(
        "counterweight.kernels.gpu.gram.add_product_",
        lambda total, x, y: pairs.append((x, y)) or add_product_(total, x, y),
    )
    expected, found = moments(kernels=False), moments(kernels=True)
    assert [x.dtype for x in calls] == [dtype] * 3  # x, its quantized self, and the original's
    assert [{x.dtype, y.dtype} for x, y in pairs] == [{dtype}] * 3
    for streams in ("xx", "yy", "tt", "xy", "xt", "yt"):
        torch.testing.assert_close(found.product(streams), expected.product(streams), rtol=1e-5, atol=1e-4)
