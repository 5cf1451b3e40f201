"""The JSON Schema: valid, documented, bounded, and of one mind with the validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from counterweight.pipeline.manifest import job_schema, load, parse_manifest
from counterweight.pipeline.manifest.document import parse_yaml
from counterweight.pipeline.manifest.expectation import expectation, resolve
from counterweight.pipeline.manifest.overrides import apply_overrides
from tests.pipeline.manifest_documents import FULL, MINIMAL, job, refused

# A larger one than the layer's shape allows is refused where the shape is known.
BOUNDED_BY_THE_LAYER = {"Activations.group_size", "Weights.group_size", "CountRank.count"}


def conforms(text: str, *overrides: str) -> bool:
    document = parse_yaml(text, name="job.yaml")
    apply_overrides(document, overrides)
    return bool(Draft202012Validator(job_schema()).is_valid(document))


def properties() -> Iterator[Any]:
    """Every key that a manifest may have, as `Model.key`, with its schema; tags speak for themselves."""
    schema = job_schema()
    for owner, definition in [("CompressionJob", schema), *schema["$defs"].items()]:
        for key, node in definition.get("properties", {}).items():
            if "const" not in node:
                # A model of one key is described as a whole.
                single = {"description": definition["description"]} if len(definition["properties"]) == 1 else {}
                node = {**single, **resolve(node, schema), **node}
                yield pytest.param(f"{owner}.{key}", node, id=f"{owner}.{key}")


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(job_schema())


def test_changing_a_copy_changes_no_other() -> None:
    job_schema().clear()
    assert job_schema()["type"] == "object"


def test_a_right_manifest_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(kind: object) -> dict[str, object]:
        raise AssertionError("of no use but for what is wrong")

    monkeypatch.setattr(load, "schema_of", made)
    parse_manifest(MINIMAL, name="job.yaml", base="file:///jobs")
    with pytest.raises(AssertionError, match="of no use"):
        parse_manifest("{}", name="job.yaml", base="file:///jobs")


@pytest.mark.parametrize(("name", "node"), list(properties()))
class TestEveryKey:
    def test_is_described_in_one_line(self, name: str, node: dict[str, Any]) -> None:
        described = node.get("description", "")
        assert described.rstrip("`").endswith((".", ")")), f"{name} has no docstring that ends in a full stop"
        assert "\n" not in described

    def test_is_bounded_when_it_is_an_integer(self, name: str, node: dict[str, Any]) -> None:
        for branch in [node, *node.get("anyOf", [])]:
            if branch.get("type") == "integer" and not {"enum", "const"} & branch.keys():
                assert {"minimum", "exclusiveMinimum"} & branch.keys(), f"{name} has no lower bound"
                bounded = {"maximum", "exclusiveMaximum"} & branch.keys() or name in BOUNDED_BY_THE_LAYER
                assert bounded, f"{name} has no upper bound"

    def test_is_told_in_words_when_it_is_missing(self, name: str, node: dict[str, Any]) -> None:
        assert expectation(node, job_schema()), f"{name}: nothing to say about what is expected"


@pytest.mark.parametrize(
    "override",
    [
        "spec.calibration.source={uri: x}",
        "spec.calibration.source={kind: tokens, uri: x}",
        "spec.calibration.source={kind: standard_library, part: train}",
        "spec.calibration.source={kind: dataset, path: x, rows: 5}",
        "spec.recipe.weights.quantizer={kind: rtn}",
        "spec.recipe.compensation={kind: none}",
        "spec.recipe.compensation={kind: svd, rank: {fraction: 0.1}}",
        "spec.recipe.compensation={kind: svd, rank: {energy: 0.5}}",
        "spec.validation=null",
        "metadata.labels={a.b/c: d}",
    ],
)
def test_both_accept(override: str) -> None:
    job(FULL, override)
    assert conforms(FULL, override)


@pytest.mark.parametrize(
    "override",
    [
        "surplus=1",
        "spec.surplus=1",
        "spec.calibration.source.surplus=1",
        "spec.recipe.weights.surplus=1",
        "spec.recipe.compensation.surplus=1",
        "apiVersion=v2",
        "metadata.name=No",
        "metadata.labels={'a b': c}",
        "metadata.labels={a: 1}",
        "spec.model={}",
        "spec.calibration.source={}",
        "spec.calibration.source={kind: dataset, uri: x}",
        "spec.calibration.source={part: train}",
        "spec.calibration.sequences=0",
        "spec.calibration.sequences='4'",
        "spec.calibration.sampling=any",
        "spec.recipe.weights.bits=9",
        "spec.recipe.weights.quantizer={}",
        "spec.recipe.weights.symmetric=1",
        "spec.recipe.compensation.rank={count: 4, fraction: 0.1}",
        "spec.recipe.compensation.rank={count: 0}",
        "spec.recipe.compensation.rank={}",
        "spec.recipe.overrides=[{weights: {bits: 8}}]",
        "spec.recipe.keep=[1]",
        "spec.validation.gates.kl=0",
        "spec.resources.workers=1.5",
    ],
)
def test_both_refuse(override: str) -> None:
    assert refused(FULL, override)
    assert not conforms(FULL, override)


def test_both_accept_the_documents_as_they_are() -> None:
    assert conforms(MINIMAL)
    assert conforms(FULL)
