"""Jobs whose calibration tokens are several shards, on one and on several workers: who did what leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import REPORT, REPORT_PAGE
from counterweight.workers.tasks.setting import shard_sequences
from tests.inprocess import local, run_job
from tests.models import checkpoint

LENGTH = 2048
CALIBRATION = {"sequences": 2 * shard_sequences(LENGTH) + 1, "sequence_length": LENGTH}
"""Three shards, of which the last is small."""

RECIPES: dict[str, Any] = {
    "W4A4, LRC": {
        "weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}},
        "activations": {"bits": 4, "clip": "search"},
        "compensation": {"kind": "lrc", "rank": {"count": 4}},
    },
    "smoothed, ranks shared out": {
        "transforms": [{"kind": "smoothing"}],
        "weights": {"bits": 3, "group_size": 32, "quantizer": {"kind": "rtn"}},
        "activations": {"bits": 8},
        "compensation": {"kind": "svd", "rank": {"budget_bits": 2.0}},
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_artifact_is_that_of_one_worker(recipe: str, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=3, max_position_embeddings=LENGTH)
    made = {}
    for workers, threads in ((1, 1), (2, 1), (3, 2)):
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


def test_a_job_on_other_workers_finds_what_was_finished(tmp_path: Path) -> None:
    """The same output twice, with another gate of no consequence so that the artifact is another: no block is run again."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2, max_position_embeddings=LENGTH)
    recipe = RECIPES["W4A4, LRC"]
    run_job(tmp_path / "model", tmp_path, recipe, calibration=CALIBRATION, workers=2)
    commits = sorted((tmp_path / "artifacts" / "_work" / "commits" / "block").iterdir())
    assert len(commits) == 2
    run_job(tmp_path / "model", tmp_path, recipe, calibration=CALIBRATION, validation={"windows": 2})
    assert sorted((tmp_path / "artifacts" / "_work" / "commits" / "block").iterdir()) == commits
