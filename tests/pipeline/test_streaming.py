"""Jobs whose calibration tokens are several shards, on one and on several workers: who did what leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import REPORT, REPORT_PAGE, open_artifact
from counterweight.workers.tasks.setting import shard_sequences
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.pipeline.unlike_recipes import RECIPES

LENGTH = 2048
CALIBRATION = {"sequences": 2 * shard_sequences(LENGTH) + 1, "sequence_length": LENGTH}
"""Three shards, of which the last is small."""

SHORT = {"sequences": 12, "sequence_length": 32, "held_out": 0}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_artifact_is_that_of_one_worker(recipe: str, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=3, max_position_embeddings=LENGTH)
    made = {}
    for workers, threads in ((1, 1), (2, 4), (3, 2)):
        output = tmp_path / str(workers)
        published = run_job(
            tmp_path / "model",
            output,
            RECIPES[recipe],
            calibration=CALIBRATION,
            workers=workers,
            threads=threads,
        )
        files = {name: entry.sha256 for name, entry in published.document.files.items()}
        made[workers] = {name: sha256 for name, sha256 in files.items() if name not in (REPORT, REPORT_PAGE)}
        assert local(published).name == published.document.id
    assert made[1] == made[2] == made[3]


GPTQ = {"weights": {"bits": 3, "group_size": 32, "quantizer": {"kind": "gptq"}}}
"""Codes depend on what enters a block; nothing looks at what would enter it in the original model."""


def of_blocks(model: Path, output: Path, workers: int, **calibration: Any) -> dict[str, str]:
    """Tensor -> sha256, of what became of each block."""
    published = run_job(model, output, GPTQ, calibration={**SHORT, **calibration}, workers=workers)
    store, _ = open_artifact(published.uri)
    tensors = json.loads(store.read("ledger.json"))["tensors"]
    return {name: sha256 for name, sha256 in tensors.items() if "layers." in name}


def test_segments_begin_with_the_originals_activations(tmp_path: Path) -> None:
    """The first's blocks are those of `compressed`, and what the second begins with is that of `original`; whoever did what.
    Segments of one block are `original`, one of all blocks is `compressed`."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=3)

    def made(name: str, workers: int = 1, **calibration: Any) -> dict[str, str]:
        return of_blocks(tmp_path / "model", tmp_path / name, workers, **calibration)

    original, compressed = made("original", propagate="original"), made("compressed", propagate="compressed")
    by_two = made("two", propagate="compressed", segment_blocks=2)

    def same(other: dict[str, str], block: int) -> bool:
        own = {name: sha256 for name, sha256 in by_two.items() if f"layers.{block}." in name}
        assert own
        return own.items() <= other.items()

    assert [same(original, block) for block in range(3)] == [True, False, True]
    assert [same(compressed, block) for block in range(3)] == [True, True, False]
    assert made("two by three", 3, propagate="compressed", segment_blocks=2) == by_two
    assert made("one", propagate="compressed", segment_blocks=1) == original
    assert made("all", propagate="compressed", segment_blocks=3) == compressed


def test_a_job_on_other_workers_finds_what_was_finished(tmp_path: Path) -> None:
    """The same output twice, with another gate of no consequence so that the artifact is another: no block is run again."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2, max_position_embeddings=LENGTH)
    recipe = RECIPES["W4A4, LRC"]
    run_job(tmp_path / "model", tmp_path, recipe, calibration=CALIBRATION, workers=2)
    commits = sorted((tmp_path / "artifacts" / "_work" / "commits" / "block").iterdir())
    assert len(commits) == 2
    run_job(tmp_path / "model", tmp_path, recipe, calibration=CALIBRATION, validation={"windows": 2})
    assert sorted((tmp_path / "artifacts" / "_work" / "commits" / "block").iterdir()) == commits
