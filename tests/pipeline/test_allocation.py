"""One budget for all branches: against brute force, and through a whole job."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.allocation import Candidate, allocate
from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.report import Report
from counterweight.workers import calibrated_block
from counterweight.workers.shards import run_shards
from tests.inprocess import run_job
from tests.models import checkpoint


def candidate(gains: list[float], rows: int = 8, columns: int = 8, factor_bits: int = 16) -> Candidate:
    return Candidate(rows=rows, columns=columns, gains=gains, factor_bits=factor_bits)


def test_is_the_best_use_of_a_budget_among_all() -> None:
    """All layers of one size, so that nothing is left over: every other way to spend as much wins less."""
    layers = {
        (0, "a"): candidate([9.0, 4.0, 1.0]),
        (0, "b"): candidate([7.0, 6.0, 5.0]),
        (1, "a"): candidate([3.0, 0.5, 0.1]),
    }
    cost = candidate([]).cost
    weights = 3 * 64
    for directions in range(10):
        ranks = allocate(layers, directions * cost / weights)
        assert sum(ranks.values()) == directions
        won = sum(sum(layers[layer].gains[:rank]) for layer, rank in ranks.items())
        best = max(
            sum(sum(layer.gains[:rank]) for layer, rank in zip(layers.values(), split, strict=True))
            for split in itertools.product(range(4), repeat=3)
            if sum(split) == directions
        )
        assert won == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_layers_of_other_sizes_win_all_but_less_than_one_direction(seed: int) -> None:
    """Against every choice of ranks that the budget allows."""
    draw = random.Random(seed)
    layers = {
        (0, name): candidate(sorted((draw.random() for _ in range(4)), reverse=True), 8, draw.choice([4, 8, 24, 64]))
        for name in "abcd"
    }
    weights = sum(layer.rows * layer.columns for layer in layers.values())
    for bits in (1.0, 3.0, 6.0):
        ranks = allocate(layers, bits)
        assert sum(layers[layer].cost * rank for layer, rank in ranks.items()) <= bits * weights
        best = max(
            sum(sum(layer.gains[:rank]) for layer, rank in zip(layers.values(), split, strict=True))
            for split in itertools.product(range(5), repeat=4)
            if sum(layer.cost * rank for layer, rank in zip(layers.values(), split, strict=True)) <= bits * weights
        )
        won = sum(sum(layers[layer].gains[:rank]) for layer, rank in ranks.items())
        left = [layer.gains[ranks[key]] for key, layer in layers.items() if ranks[key] < 4]
        assert won == pytest.approx(best) if not left else won > best - max(left)


def test_gains_count_per_bit() -> None:
    layers = {(0, "wide"): candidate([4.0], columns=800), (0, "small"): candidate([1.0])}
    total = 8 * 800 + 64
    assert allocate(layers, candidate([]).cost / total) == {(0, "wide"): 0, (0, "small"): 1}


def test_integer_factors_buy_more() -> None:
    gains = [1.0 / (rank + 1) for rank in range(8)]
    ranks = [allocate({(0, "a"): candidate(gains, 64, 64, factor_bits=bits)}, 2.0)[0, "a"] for bits in (16, 8, 4)]
    assert ranks == [4, 7, 8]  # 2048, 1088 and 576 bits a rank, of 8192


def test_directions_that_win_nothing_are_not_bought() -> None:
    assert allocate({(0, "a"): candidate([1.0, 0.0, 0.0])}, 16.0) == {(0, "a"): 1}


@pytest.mark.parametrize(
    ("kind", "bits", "budget"), [("svd", 8, 4.0), ("lrc", 8, 4.0), ("lrc", 4, 2.5), ("aser", 8, 4.0)]
)
def test_a_job_spends_its_budget_and_no_more(kind: str, bits: int, budget: float, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    recipe = {
        "weights": {"bits": 3, "group_size": None, "quantizer": {"kind": "gptq"}},
        "activations": {"bits": 4},
        "compensation": {
            "kind": kind,
            "rank": {"budget_bits": budget},
            "factor_bits": bits,
            **({"refit": "none"} if bits == 4 else {}),
        },
    }
    published = run_job(tmp_path / "model", tmp_path, recipe, validation={})
    store, _ = open_artifact(published.uri)
    report = Report.model_validate_json(store.read("report/report.json"))
    spent = report.bits_per_weight.factors
    largest = max((module.rows + module.columns) * bits + 64 for module in report.modules)
    weights = sum(module.rows * module.columns for module in report.modules)
    assert budget - 2 * largest / weights < spent <= budget
    assert len({module.rank for module in report.modules}) > 1


def test_propagated_jobs_share_out_too(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    recipe = {
        "weights": {"bits": 3, "group_size": None, "quantizer": {"kind": "gptq"}},
        "compensation": {"kind": "svd", "rank": {"budget_bits": 2.0}},
    }
    published = run_job(tmp_path / "model", tmp_path, recipe, calibration={"propagate": "compressed"})
    assert 0 < published.document.bits_per_weight.factors <= 2.0


def passes_of(
    monkeypatch: pytest.MonkeyPatch, model: Path, output: Path, recipe: Mapping[str, Any], **options: Any
) -> tuple[int, bytes]:
    """How often a job ran a block for its statistics; and the bytes of its first shard of blocks."""
    passes: list[int] = []
    counted = lambda *arguments: passes.append(1) or run_shards(*arguments)  # noqa: E731
    monkeypatch.setattr(calibrated_block, "run_shards", counted)
    published = run_job(model, output, recipe, calibration={"held_out": 0}, **options)
    store, _ = open_artifact(published.uri)
    return len(passes), store.read("model-00002-of-00006.safetensors")


@pytest.mark.parametrize("kind", ["svd", "lrc"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_block_is_calibrated_once_where_its_statistics_fit_and_twice_where_they_do_not(
    kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On however many workers, and to the same bits."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=4)
    recipe = {
        "weights": {"bits": 3, "group_size": None, "quantizer": {"kind": "rtn"}},
        "compensation": {"kind": kind, "rank": {"budget_bits": 2.0}},
    }
    count, kept = passes_of(monkeypatch, tmp_path / "model", tmp_path / "kept", recipe, workers=workers)
    assert count == 4
    count, dropped = passes_of(
        monkeypatch, tmp_path / "model", tmp_path / "dropped", recipe, workers=workers, hold_bytes=0
    )
    if workers == 4:  # they have a block each, and let it go where they do something else before its budget is known
        assert 4 <= count <= 8
    else:
        assert count == 8
    assert kept == dropped


def test_statistics_that_depend_on_the_rank_are_gathered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ASER takes out at most half as many channels as its branch has ranks, which is known when the budget is shared out."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=4)
    recipe = {
        "weights": {"bits": 3, "group_size": None, "quantizer": {"kind": "rtn"}},
        "compensation": {"kind": "aser", "rank": {"budget_bits": 2.0}, "smoothing": False},
    }
    count, _ = passes_of(monkeypatch, tmp_path / "model", tmp_path / "job", recipe)
    assert count == 8
