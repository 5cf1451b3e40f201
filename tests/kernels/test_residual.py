"""The residual store against loops written from the paper's text: layout, buckets, choice of channels, correction."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from counterweight.kernels.residual import (
    Correction,
    ResidualStore,
    bucket_floors,
    compensate,
    select_bucketed,
    select_chunked,
    select_exact,
    select_static,
)
from tests.workers.kinds import KINDS


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Activations whose outliers change from token to token."""
    return torch.randn(tokens, columns, generator=generator(seed)) ** 3


def thresholds_of(x: Tensor) -> Tensor:
    return x.abs().sort(dim=1, descending=True).values.amax(0)


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    top = (1 << (bits - 1)) - 1
    return torch.randint(-top, top + 1, (rows, columns), generator=generator(1)).to(torch.int8)


def random_store(rows: int = 11, columns: int = 40, bits: int = 4) -> ResidualStore:
    scale = torch.rand(rows, generator=generator(2)) + 0.1
    thresholds = thresholds_of(heavy_tailed(20, columns))
    return ResidualStore.of(random_codes(rows, columns, bits), scale, thresholds, bits=bits)


def chosen_by_hand(token: list[float], k_chunk: int, thresholds: list[float]) -> set[int]:
    """One token's channels as the kernel's text has it: lists per bucket, walked from the largest bucket."""
    columns = len(token)
    k = max(1, k_chunk * columns // 1024)
    first, last = thresholds[0], thresholds[k - 1]
    floors = [first + (last - first) * i / 15 if i < 16 else last * (31 - i) / 16 for i in range(32)]
    ceilings = [float("inf"), *floors[:-1]]
    chosen: set[int] = set()
    for start in range(0, columns, 1024):
        members = range(start, min(start + 1024, columns))
        quota = k_chunk * len(members) // 1024 if columns >= 1024 else k
        buckets = [[i for i in members if floors[b] <= abs(token[i]) < ceilings[b]] for b in range(32)]
        for bucket in buckets:
            for channel in bucket:
                if quota:
                    chosen.add(channel)
                    quota -= 1
    return chosen


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [16, 11])
def test_output_8c_plus_j_of_a_row_lies_in_word_c_at_nibble_j(rows: int, bits: int) -> None:
    codes, per_word = random_codes(rows, 5, bits), 32 // bits
    packed = ResidualStore.of(codes, torch.ones(rows), torch.zeros(5), bits=bits).packed
    assert packed.dtype == torch.int32
    assert packed.shape == (5, -(-rows // per_word))
    for channel in range(5):
        for output in range(per_word * packed.shape[1]):
            word = int(packed[channel, output // per_word]) & 0xFFFFFFFF
            stored = word >> bits * (output % per_word) & (1 << bits) - 1
            assert stored == (int(codes[output, channel]) + (1 << (bits - 1)) if output < rows else 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_store_means_codes_times_scale(bits: int) -> None:
    store = random_store(bits=bits)
    expected = random_codes(11, 40, bits).float() * store.scale.unsqueeze(1)
    assert torch.equal(store.dense(), expected)
    channels = torch.tensor([39, 0, 7])
    assert torch.equal(store.rows(channels), expected[:, channels].T)
    assert store.rows(channels[:0]).shape == (0, 11)
    assert store.in_features == 40


def test_bits_stored_counts_codes_scales_and_thresholds() -> None:
    store = random_store(rows=16, columns=40)
    assert store.bits_stored == 16 * 40 * 4 + 16 * 32 + 40 * 32
    importance = torch.ones(40)
    dynamic = Correction(store=store, channels_per_chunk=100)
    static = Correction(store=store, channels_per_chunk=100, selection="static", importance=importance)
    assert (dynamic.bits_stored, static.bits_stored) == (store.bits_stored, store.bits_stored + 40 * 32)


def test_a_store_moves_as_a_whole() -> None:
    moved = random_store().to(torch.device("meta"))
    assert {moved.packed.device.type, moved.scale.device.type, moved.thresholds.device.type} == {"meta"}
    assert (moved.out_features, moved.bits) == (11, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits: 3: expected 2, 4 or 8"),
        ({"scale": torch.ones(4)}, r"scale: \[4\]: expected \[3\]"),
        ({"thresholds": torch.ones(3)}, r"thresholds: \[3\]: expected \[5\]"),
        ({"codes": torch.full((3, 5), -8, dtype=torch.int8)}, "codes: smallest -8: expected -7 or more"),
        ({"codes": torch.full((3, 5), 8, dtype=torch.int8)}, "codes: range 8 .. 8"),
    ],
)
def test_what_contradicts_itself_is_not_packed(change: dict[str, object], message: str) -> None:
    arguments = {"codes": torch.zeros(3, 5, dtype=torch.int8), "scale": torch.ones(3), "thresholds": torch.ones(5)}
    with pytest.raises(ValueError, match=message):
        ResidualStore.of(**(arguments | change))  # type: ignore[arg-type]


def test_the_exact_choice_has_the_k_largest_magnitudes() -> None:
    x = heavy_tailed(30, 50)
    selected = select_exact(x, 7)
    assert (selected.sum(-1) == 7).all()
    smallest_taken = x.abs().masked_fill(~selected, torch.inf).amin(-1)
    largest_left = x.abs().masked_fill(selected, 0).amax(-1)
    assert (smallest_taken >= largest_left).all()


def test_equal_magnitudes_go_to_the_lowest_channels() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 2.0, 1.0, -2.0]])
    assert select_exact(x, 3)[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert select_exact(x, 5)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 5]


def test_ties_are_settled_alike_in_wide_layers() -> None:
    x = torch.ones(2, 3000)
    x[1, ::2] = -1
    assert (select_exact(x, 100) == (torch.arange(3000) < 100)).all()


def test_a_static_choice_follows_importance_alone() -> None:
    assert select_static(torch.tensor([0.1, 3.0, 2.0, 5.0]), 2).tolist() == [False, True, False, True]


@pytest.mark.parametrize("columns", [40, 1024, 2048, 2500])
@pytest.mark.parametrize("k_chunk", [1, 30, 1024])
def test_the_bucketed_choice_is_the_walk_over_buckets(columns: int, k_chunk: int) -> None:
    thresholds = thresholds_of(heavy_tailed(50, columns, seed=3))
    x = heavy_tailed(4, columns, seed=4)
    x[0] *= 100  # beyond what calibration saw: all in bucket 0
    x[1] *= 0.01  # all in the last buckets
    x[2, ::3] = 0
    selected = select_bucketed(x, k_chunk, thresholds)
    for token in range(len(x)):
        expected = chosen_by_hand(x[token].tolist(), k_chunk, thresholds.tolist())
        assert set(selected[token].nonzero().flatten().tolist()) == expected


def test_a_magnitude_equal_to_a_floor_lies_in_the_bucket_above_it() -> None:
    thresholds = torch.full((1024,), 16.0)
    thresholds[0] = 31  # floors are 31, 30, .. 0
    x = torch.zeros(1024)
    x[9], x[3], x[5] = -20.0, 19.9, 19.99
    assert select_bucketed(x, 2, thresholds).nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("columns", [40, 1024, 2500])
def test_the_chunked_choice_is_the_largest_of_every_chunk(columns: int) -> None:
    x = heavy_tailed(4, columns, seed=4)
    x[1, ::7] = 3.0
    selected = select_chunked(x, 30)
    for start in range(0, columns, 1024):
        chunk, chosen = x[:, start : start + 1024].abs(), selected[:, start : start + 1024]
        share = 30 if chunk.shape[1] == 1024 else int(chosen[0].sum())
        for token in range(len(x)):
            ranked = sorted(range(chunk.shape[1]), key=lambda channel: (-float(chunk[token, channel]), channel))
            assert chosen[token].nonzero().flatten().tolist() == sorted(ranked[:share])


@pytest.mark.parametrize("columns", [40, 1000, 1024, 2500])
@pytest.mark.parametrize("k_chunk", [1, 7, 367, 1024])
@pytest.mark.parametrize("buckets", [False, True])
def test_every_token_gets_its_share_of_every_chunk(columns: int, k_chunk: int, buckets: bool) -> None:
    x = heavy_tailed(6, columns).reshape(2, 3, columns)
    thresholds = thresholds_of(x.flatten(0, 1))
    selected = select_bucketed(x, k_chunk, thresholds) if buckets else select_chunked(x, k_chunk)
    assert selected.shape == x.shape
    assert (selected.sum(-1) == max(1, k_chunk * columns // 1024)).all()
    for start in range(0, columns - 1023, 1024):
        assert (selected[..., start : start + 1024].sum(-1) == k_chunk).all()


def test_half_precision_is_bucketed_like_the_same_values_in_float32() -> None:
    x = heavy_tailed(5, 300).bfloat16()
    thresholds = thresholds_of(heavy_tailed(50, 300, seed=1))
    assert torch.equal(select_bucketed(x, 40, thresholds), select_bucketed(x.float(), 40, thresholds))
    assert torch.equal(select_exact(x, 40), select_exact(x.float(), 40))


@pytest.mark.parametrize("k", [1, 5, 8])
def test_floors_descend_from_the_first_threshold_over_the_kth_to_zero(k: int) -> None:
    thresholds = torch.tensor([3e30, 5.0, 4.0, 0.3, 1e-3, 1e-3, 1e-9, 0.0])
    floors = bucket_floors(thresholds, k)
    assert floors[0] == thresholds[0]
    assert floors[15] == thresholds[k - 1]
    assert floors[31] == 0
    assert all(high >= low for high, low in pairwise(floors.tolist()))


def test_thresholds_of_zero_leave_the_lowest_channels() -> None:
    selected = select_bucketed(heavy_tailed(2, 1024), 3, torch.zeros(1024))
    assert (selected == (torch.arange(1024) < 3)).all()


def test_most_of_the_exact_choice_is_found_on_heavy_tails() -> None:
    thresholds = thresholds_of(heavy_tailed(512, 4096, seed=1))
    x = heavy_tailed(64, 4096, seed=2)
    chunked, exact = select_bucketed(x, 16, thresholds), select_exact(x, 64)
    assert (chunked & exact).sum() / exact.sum() >= 0.7


def test_buckets_come_close_to_the_best_choice_within_chunks() -> None:
    """What is lost against the exact choice is lost to chunks, not to buckets: with one chunk, nearly nothing is."""
    thresholds = thresholds_of(heavy_tailed(512, 1024, seed=1))
    x = heavy_tailed(64, 1024, seed=2)
    chunked, exact = select_bucketed(x, 64, thresholds), select_exact(x, 64)
    assert (chunked & exact).sum() / exact.sum() >= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compensation_is_the_sum_over_the_selected_channels(dtype: torch.dtype) -> None:
    store, x = random_store(), heavy_tailed(6, 40).to(dtype).reshape(2, 3, 40)
    selected = select_exact(x, 9)
    result = compensate(x, store, selected)
    assert result.dtype == torch.float32
    for first in range(2):
        for second in range(3):
            channels = selected[first, second].nonzero().flatten()
            gathered = x[first, second, channels].double() @ store.rows(channels).double()
            torch.testing.assert_close(result[first, second].double(), gathered, rtol=1e-5, atol=1e-4)


def test_all_channels_are_the_dense_product_and_none_is_zero() -> None:
    store, x = random_store(), heavy_tailed(6, 40)
    for all_of_them in (select_exact(x, 40), select_bucketed(x, 1024, store.thresholds)):
        assert torch.equal(compensate(x, store, all_of_them), x @ store.dense().T)
    for none in (select_exact(x, 0), select_bucketed(x, 0, store.thresholds), select_static(x[0], 0)):
        assert torch.equal(compensate(x, store, none), torch.zeros(6, 11))


def test_a_token_does_not_depend_on_the_others() -> None:
    store, x = random_store(), heavy_tailed(6, 40)
    assert torch.equal(select_bucketed(x, 300, store.thresholds)[2], select_bucketed(x[2], 300, store.thresholds))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_without_a_bucket_are_refused(value: float) -> None:
    x = torch.ones(2, 40)
    x[1, 3] = value
    with pytest.raises(ValueError, match="x: holds NaN or infinity"):
        select_bucketed(x, 1, torch.ones(40))
    with pytest.raises(ValueError, match="x: holds NaN or infinity"):
        select_exact(x, 1)


def test_impossible_choices_are_refused() -> None:
    x = torch.ones(2, 40)
    with pytest.raises(ValueError, match=r"k_chunk: 1025: expected 0 \.\. 1024"):
        select_bucketed(x, 1025, torch.ones(40))
    with pytest.raises(ValueError, match=r"thresholds: \[41\]: expected \[40\]"):
        select_bucketed(x, 1, torch.ones(41))
    with pytest.raises(ValueError, match=r"k: 41: expected 0 \.\. 40"):
        select_exact(x, 41)


def test_one_token_alone_is_corrected_as_among_others() -> None:
    store, x = random_store(), heavy_tailed(6, 40)
    selected = select_exact(x, 9)
    together = compensate(x, store, selected)
    for token in range(6):
        alone = compensate(x[token : token + 1], store, selected[token : token + 1])
        torch.testing.assert_close(alone, together[token : token + 1])
    assert not compensate(x[:1], store, torch.zeros(40, dtype=torch.bool)).any()


def ranked(token: list[float], channels: range, k: int) -> set[int]:
    """The k largest magnitudes among some channels, of equals the lowest, by sorting."""
    return set(sorted(channels, key=lambda channel: (-abs(token[channel]), channel))[:k])


@pytest.mark.parametrize("ties", [False, True], ids=["all different", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_is_that_of_sorting_on_every_kind_of_input(kind: str, ties: bool) -> None:
    """One whole chunk and the rest of another; where there are ties, magnitudes are few."""
    source, width, k_chunk = generator(6), 1124, 60

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    x = KINDS[kind](draw(40, width), draw)
    if ties:
        x = (2 * x).round() / 2
    thresholds, importance = thresholds_of(x[4:]), x[4:].square().mean(0)
    chunked, bucketed = select_chunked(x[:4], k_chunk), select_bucketed(x[:4], k_chunk, thresholds)
    exact, static = select_exact(x[:4], 65), select_static(importance, 65)
    chosen = [set(one.nonzero().flatten().tolist()) for one in (*chunked, *bucketed, *exact, static)]
    tokens = x[:4].tolist()
    expected = [ranked(token, range(1024), 60) | ranked(token, range(1024, width), 5) for token in tokens]
    expected += [chosen_by_hand(token, k_chunk, thresholds.tolist()) for token in tokens]
    expected += [ranked(token, range(width), 65) for token in tokens]
    expected += [ranked(importance.tolist(), range(width), 65)]
    assert chosen == expected
