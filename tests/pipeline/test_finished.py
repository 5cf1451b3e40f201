"""A job that is done already says so before Ray starts; one that is not starts it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from counterweight.pipeline.artifact import Published
from counterweight.pipeline.events import ArtifactPublished
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.run import run_job
from tests.pipeline.tiny import Events, job_of, run_local, write_job


class Started(Exception):
    """Ray would have been started."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> NoReturn:
        raise Started

    monkeypatch.setattr("counterweight.pipeline.run.cluster", started)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    manifest = write_job(tmp_path_factory.mktemp("finished"), layers=1)
    return manifest, run_local(job_of(manifest))


def test_it_is_found_without_ray(template: tuple[Path, Published]) -> None:
    manifest, published = template
    events = Events()
    again = run_job(job_of(manifest, "spec.resources.workers=2"), events, address="local")
    assert (again.uri, again.existing) == (published.uri, True)
    assert events.named("note") == [("already published: all 1 blocks are reused, nothing is left to do",)]
    assert any(isinstance(event, ArtifactPublished) for event in events.all)


@pytest.mark.parametrize("changed", ["recipe", "weights", "text", "resume"])
def test_another_job_starts_it(changed: str, template: tuple[Path, Published], tmp_path: Path) -> None:
    shutil.copytree(template[0].parent, tmp_path / "job")
    manifest, overrides = tmp_path / "job" / "job.yaml", []
    if changed == "recipe":
        overrides = ["spec.recipe.weights.bits=3"]
    if changed == "weights":
        weights = tmp_path / "job" / "model" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)
    if changed == "text":
        text = tmp_path / "job" / "calibration.txt"
        text.write_text("w3 " + text.read_text())
    resume = Resume.NEVER if changed == "resume" else Resume.AUTO
    with pytest.raises(Started):
        run_job(job_of(manifest, *overrides), Events(), address="local", resume=resume)
