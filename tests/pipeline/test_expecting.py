"""How long a job takes is said before anything of it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from counterweight.pipeline import run
from counterweight.pipeline.events import Doing, Event, Expected
from counterweight.pipeline.expecting import FORK_SECONDS, expected_stages
from counterweight.pipeline.progress import Progress
from tests.pipeline.tiny import job_of, write_job


class Seen(Progress):
    """Remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


def stages(manifest: Path, *overrides: str, forked: bool = False) -> dict[str, float]:
    job = job_of(manifest, *overrides)
    return dict(expected_stages(job, job.spec.model.uri, forked=forked))


def test_it_is_said_before_workers_start(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def none(*_: object) -> Iterator[None]:
        raise RuntimeError("workers start now")
        yield

    monkeypatch.setattr(run, "_pool", none)
    seen = Seen()
    with pytest.raises(RuntimeError, match="workers start now"):
        run.run_job(job_of(manifest), seen, address="none")
    doing, expected = seen.events[:2]
    assert isinstance(doing, Doing)
    assert isinstance(expected, Expected)
    assert list(expected.stages) == ["start", "inventory", "blocks", "assemble", "validate"]
    assert expected.stages["start"] == FORK_SECONDS
    assert all(seconds > 0 for seconds in expected.stages.values())


def test_it_is_that_of_the_plan(manifest: Path) -> None:
    few, many = stages(manifest), stages(manifest, "spec.calibration.sequences=14")
    assert many["blocks"] > few["blocks"]
    assert "validate" not in stages(manifest, "spec.validation=null")
    assert few["start"] > FORK_SECONDS == stages(manifest, forked=True)["start"]
    assert stages(manifest, "spec.resources.gpus_per_worker=1")["blocks"] > 0


def test_of_what_only_transformers_knows_and_of_what_is_wrong_nothing_is_said(manifest: Path) -> None:
    assert stages(manifest, "spec.recipe.compensation.rank.count=5000") == {}
    config = manifest.parent / "model" / "config.json"
    text = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(text), "something": "new"}))
        assert stages(manifest) == {}
    finally:
        config.write_text(text)
