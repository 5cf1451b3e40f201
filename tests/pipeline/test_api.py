"""What `import counterweight` offers; `docs/python.md`, whose examples the suite runs, runs whole jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import counterweight
from counterweight.pipeline.api import job_of
from counterweight.pipeline.manifest import load_manifest
from counterweight.pipeline.starter import job_name
from counterweight.workers.errors import ManifestError, RequestError
from tests.pipeline.tiny import write_job

RECIPE = {"weights": {"bits": 4, "group_size": 32}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("api"), layers=2).parent


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_importing_it_imports_nothing_else() -> None:
    seen = "import sys, counterweight; print([m for m in ('torch', 'transformers', 'pydantic', 'ray') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", seen], text=True).strip() == "[]"


@pytest.mark.parametrize("name", counterweight.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    assert name in dir(counterweight)
    assert getattr(counterweight, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        counterweight.__getattr__("compres")


class TestJobs:
    def test_a_manifest_in_three_forms_is_one_job(self, here: Path) -> None:
        by_path = job_of("job.yaml")
        assert job_of(by_path) == job_of(by_path.model_dump(mode="json")) == by_path == load_manifest("job.yaml").job

    def test_an_output_replaces_the_manifests(self, here: Path) -> None:
        assert job_of("job.yaml", output="other").spec.output.uri == (here / "other").as_uri()

    def test_a_model_and_a_recipe_are_a_job(self, here: Path) -> None:
        job = job_of("model", RECIPE, calibration="calibration.txt", validation=Path("validation.txt"), output="out")
        assert job.metadata.name == "model"
        assert job.spec.model.uri == (here / "model").as_uri()
        assert job.spec.calibration.sequence_length == 256  # the model's positions
        assert job.spec.validation is not None
        assert job.spec.validation.text.kind == "text"

    def test_sections_of_a_manifest_are_taken_as_they_are(self, here: Path) -> None:
        calibration = {"source": {"uri": "calibration.txt"}, "sequences": 3, "sequence_length": 7}
        job = job_of("model", RECIPE, calibration=calibration, output="out")
        assert (job.spec.calibration.sequences, job.spec.calibration.sequence_length) == (3, 7)
        assert job.spec.validation is None

    def test_what_is_missing_or_too_much_is_said(self, here: Path) -> None:
        with pytest.raises(RequestError, match="calibration: expected with a recipe"):
            job_of("model", RECIPE, output="out")
        with pytest.raises(RequestError, match="output: expected with a recipe"):
            job_of("model", RECIPE, calibration="calibration.txt")
        with pytest.raises(RequestError, match="a manifest has its own"):
            job_of("job.yaml", calibration="calibration.txt")
        with pytest.raises(RequestError, match="expected the path or URI of a model"):
            job_of(job_of("job.yaml"), RECIPE)
        with pytest.raises(ManifestError, match="bits: 9"):
            job_of("model", {"weights": {"bits": 9}}, calibration="calibration.txt", output="out")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf:meta-llama/Meta-Llama-3-8B@main", "meta-llama-3-8b"),
        ("file:///models/Qwen2.5_7B/", "qwen2-5-7b"),
        ("s3://bucket/x/y", "y"),
        ("hf:gpt2", "gpt2"),
        ("/___", "model"),
        ("x" * 80, "x" * 63),
    ],
)
def test_a_job_is_named_after_its_model(model: str, name: str) -> None:
    assert job_name(model) == name
