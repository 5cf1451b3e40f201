"""What the jobs of a sweep over ranks share through their keys, counted by the tasks that ran; and what they do not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.inprocess import InProcessPool, run_job
from tests.models import checkpoint

RANKS = (2, 4, 6, 8)
LAYERS = 2

SHARED = ("embed", "keep", "original")
"""The embedding, what is carried over, and what the original makes of the validation's windows."""


def sweep(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Tasks by kind of each job, one after the other in one output, each with workers of its own."""
    pools: list[InProcessPool] = []

    class Kept(InProcessPool):
        def __init__(self, *arguments: int) -> None:
            super().__init__(*arguments)
            pools.append(self)

    monkeypatch.setattr("tests.inprocess.InProcessPool", Kept)
    checkpoint("llama", root / "model", torch.bfloat16, num_hidden_layers=LAYERS)
    for rank in RANKS:
        recipe = {"weights": {"bits": 4, "group_size": 32}, "compensation": {"kind": "svd", "rank": {"count": rank}}}
        run_job(root / "model", root / "out", recipe, validation={})
    return [Counter(kind for _, kind in pool.calls) for pool in pools]


def test_a_sweep_over_ranks_shares_what_has_no_rank_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = sweep(tmp_path, monkeypatch)
    assert all(first[kind] > 0 for kind in SHARED)
    for tasks in others:
        assert not any(tasks[kind] for kind in SHARED)
        assert tasks["block"] == LAYERS
        # Not shared: statistics are in a worker's memory and are used up. See docs/jobs.md.
        assert tasks["forward"] == first["forward"] == LAYERS
