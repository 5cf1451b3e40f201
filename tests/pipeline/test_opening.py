"""What a job does to its output before it begins."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from counterweight.pipeline import plan
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.policies import STALE
from counterweight.workers.errors import StorageError
from counterweight.workers.recipe import ModuleRecipe, Recipe
from counterweight.workers.storage.file import TEMPORARY_PREFIX, FileStore
from tests.inprocess import RecordedProgress, run_job
from tests.models import checkpoint

RECIPE = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}}}


def test_what_killed_writers_left_is_removed_by_age(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    place = tmp_path / "artifacts" / "_work" / "blobs"
    place.mkdir(parents=True)
    old, young = place / f"{TEMPORARY_PREFIX}old", place / f"{TEMPORARY_PREFIX}young"
    for path, age in ((old, STALE + timedelta(hours=1)), (young, STALE - timedelta(hours=1))):
        path.write_bytes(b"half")
        written = time.time() - age.total_seconds()
        os.utime(path, (written, written))
    progress = RecordedProgress()
    run_job(tmp_path / "model", tmp_path, RECIPE, progress=progress)
    assert not old.exists()
    assert young.exists()
    assert progress.notes == ["removed 1 unfinished writes older than 7 days"]


def test_a_store_that_cannot_be_swept_is_noted_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)

    def refuses(store: FileStore, older_than: timedelta) -> int:
        raise StorageError("list uploads: AccessDenied")

    monkeypatch.setattr(FileStore, "abort_stale_writes", refuses)
    progress = RecordedProgress()
    run_job(tmp_path / "model", tmp_path, RECIPE, progress=progress)
    assert progress.notes == ["unfinished writes of earlier jobs could not be removed: list uploads: AccessDenied"]


def test_the_recipe_of_a_block_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has tens of thousands of linears: one plan serves the check of the memory, keys and tasks."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    resolved: list[int] = []
    resolve = plan.block_recipe

    def counted(source: ModelSource, index: int, recipe: Recipe) -> dict[str, ModuleRecipe]:
        resolved.append(index)
        return resolve(source, index, recipe)

    monkeypatch.setattr(plan, "block_recipe", counted)
    run_job(tmp_path / "model", tmp_path, RECIPE)
    assert resolved == [0, 1]
