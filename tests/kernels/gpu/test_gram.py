"""Sums of x x^T and of x y^T against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.gram import STRIP, add_gram_, add_product_

pytest.importorskip("pydantic")  # of the solver's options; the rest of this folder needs torch and triton alone

from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics
from counterweight.workers.calibration.triangle import TRIANGLE_BLOCK, LowerTriangle
from counterweight.workers.parallel import in_turn
from counterweight.workers.shards import RunningStatistics
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
        (64, 300, torch.float32),
    ],
)
def test_adds_to_a_packed_triangle(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x = guarded(random(tokens, width).to(dtype).to(device))
    before = random(width, width, seed=1).double().to(device)
    entries = guarded(LowerTriangle.of(before).entries)
    assert add_gram_(entries, x) is entries
    found = LowerTriangle(width, entries).square().tril()
    torch.testing.assert_close(found, before.tril() + lower_gram(x), rtol=1e-5, atol=1e-5)
    assert bands_are_intact(entries)
    assert torch.equal(add_gram_(guarded(LowerTriangle.of(before).entries), x), entries)


def test_strips_are_those_of_a_triangle() -> None:
    assert STRIP == TRIANGLE_BLOCK


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    x = random(20, 50).half().to(device)
    triangle = LowerTriangle.zeros(40, torch.float64, device)
    add_gram_(triangle.entries, x[:, :40])
    torch.testing.assert_close(triangle.square().tril(), lower_gram(x[:, :40]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "dtype"),
    [(70, 130, 40, torch.float16), (33, 64, 200, torch.bfloat16), (1, 70, 33, torch.float32)],
)
def test_adds_the_product_of_two_inputs(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = guarded(random(tokens, rows).to(dtype).to(device))
    y = random(tokens, columns + 8, seed=1).to(dtype).to(device)[:, :columns]
    before = random(rows, columns, seed=2).double().to(device)
    total = guarded(before)
    assert add_product_(total, x, y) is total
    torch.testing.assert_close(total, before + x.double().T @ y.double(), rtol=1e-5, atol=1e-5)
    assert bands_are_intact(total)


def test_two_inputs_are_of_the_same_tokens_in_one_dtype(device: torch.device) -> None:
    x, total = random(4, 8).to(device), torch.zeros(8, 8, dtype=torch.float64, device=device)
    for other in (x[:3], x.half(), x.T):
        with pytest.raises(ValueError, match="y: "):
            add_product_(total, x, other)
    for wrong in (total.float(), total[:7], torch.zeros(8, 9, dtype=torch.float64, device=device)[:, :8]):
        with pytest.raises(ValueError, match="total: "):
            add_product_(wrong, x, x)


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    x, entries = random(4, 8).to(device), torch.zeros(64, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="x: "):
        add_gram_(entries, x.T)
    with pytest.raises(ValueError, match="x: "):
        add_gram_(entries, x[0])
    with pytest.raises(ValueError, match=r"dtype: torch\.float64"):
        add_gram_(entries, x.double())
    for other in (entries[:63], entries.float(), entries.view(8, 8)):
        with pytest.raises(ValueError, match="total: "):
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
        for shard, meant in ((rows, original), (rows.flip(0), original.flip(0))):
            accumulator.add_rows(shard, meant)
        return accumulator.result()

    calls: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(
        "counterweight.kernels.gpu.gram.add_gram_", lambda entries, x: calls.append(x) or add_gram_(entries, x)
    )
    monkeypatch.setattr(
        "counterweight.kernels.gpu.gram.add_product_",
        lambda total, x, y: pairs.append((x, y)) or add_product_(total, x, y),
    )
    expected, found = moments(kernels=False), moments(kernels=True)
    assert [x.dtype for x in calls] == [dtype] * 6  # x, its quantized self, and the original's
    assert [{x.dtype, y.dtype} for x, y in pairs] == [{dtype}] * 6
    for streams in ("xx", "yy", "tt", "xy", "xt", "yt"):
        torch.testing.assert_close(found.product(streams), expected.product(streams), rtol=1e-5, atol=1e-4)


def test_a_shard_is_added_as_it_is_seen_where_kernels_run(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of two shards, without a shard's moments in between."""

    class Block:
        def __init__(self) -> None:
            self.device, self.dtype = device, torch.float32

        def linear(self, name: str) -> torch.nn.Linear:
            return {"up": torch.nn.Linear(40, 1)}[name]

    group, shards = ("up",), [random(2, 9, 40, seed=seed).to(device) for seed in (0, 1)]
    for module in ("shards", "calibration.statistics"):
        monkeypatch.setattr(f"counterweight.workers.{module}.runs_kernels", lambda _: True)
    sums = RunningStatistics(Block(), {group: Gathering()})  # type: ignore[arg-type]
    for rows in shards:
        found = {group: sums.of(group, rows, None, in_turn)}
        assert found == {group: None}
        sums.add(found, [])
    rows = torch.cat([shard.flatten(0, 1) for shard in shards]).double()
    (statistics,) = [packed.unpacked() for packed in sums.result().packed.values()]
    assert statistics.tokens == 36
    torch.testing.assert_close(statistics.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
