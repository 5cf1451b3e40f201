"""The manifests that users start from, and the schema that their editors read."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from counterweight.pipeline.manifest import load_manifest, schema_text
from counterweight.pipeline.manifest.document import parse_yaml
from counterweight.pipeline.manifest.schema import job_schema
from counterweight.workers.calibration.source import TextSource

MANIFESTS = Path(__file__).parents[2] / "manifests"
FILES = sorted(MANIFESTS.glob("*.yaml"))


def test_there_are_manifests() -> None:
    names = {path.stem for path in FILES}
    assert {"demo", "demo-w4g128", "llama-3-8b-w4a16", "mixtral-8x7b-w4a16-lowrank"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestEach:
    def test_loads_under_its_own_name(self, path: Path) -> None:
        job = load_manifest(str(path)).job
        assert job.metadata.name == path.stem
        assert job.spec.output.uri.startswith(("file:///", "s3://"))

    def test_is_what_the_schema_describes(self, path: Path) -> None:
        document = parse_yaml(path.read_bytes(), name=path.name)
        assert list(Draft202012Validator(job_schema()).iter_errors(document)) == []

    def test_begins_with_the_schema_and_says_in_two_lines_what_it_is_for(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        assert lines[0] == "# yaml-language-server: $schema=schema.json"
        assert [line[:2] for line in lines[1:4]] == ["# ", "# ", "ap"]

    def test_is_judged_on_another_text_than_it_is_calibrated_on(self, path: Path) -> None:
        spec = load_manifest(str(path)).job.spec
        assert spec.validation is not None
        assert spec.validation.text != spec.calibration.source


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("demo")], ids=lambda path: path.stem)
def test_the_demo_needs_nothing_but_the_repository(path: Path) -> None:
    spec = load_manifest(str(path)).job.spec
    assert spec.model.uri == (MANIFESTS / "demo" / "model").resolve().as_uri()
    assert spec.validation is not None
    for source in (spec.calibration.source, spec.validation.text):
        assert isinstance(source, TextSource)
        assert Path(source.uri.removeprefix("file://")).parent == (MANIFESTS / "demo" / "text").resolve()
    assert spec.resources.gpus_per_worker == 0


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("reference-")], ids=lambda path: path.stem
)
def test_the_reference_jobs_are_comparable(path: Path) -> None:
    spec = load_manifest(str(path)).job.spec
    calibration, validation = spec.calibration, spec.validation
    assert (calibration.sequences, calibration.sequence_length, calibration.sampling) == (
        128,
        256,
        "consecutive",
    )
    assert validation is not None
    assert (validation.windows, spec.validation_sequence_length) == (160, 256)
    assert isinstance(validation.text, TextSource)
    assert validation.text.uri.endswith("/shared/data/wikitext2/wiki.test.raw")


def test_the_published_schema_is_current() -> None:
    # When this fails after a change of the models: counterweight schema > manifests/schema.json
    assert (MANIFESTS / "schema.json").read_text() == schema_text()
