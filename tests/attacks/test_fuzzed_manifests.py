"""Whatever a manifest's text or values are, it is a job or a `ManifestError`; no other error escapes."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from counterweight.pipeline.manifest import parse_manifest
from counterweight.workers.errors import ManifestError
from tests.pipeline.manifest_documents import BASE, FULL, check_lines, job


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
@example("a: !<tag:yaml.org,2002:int> 1")
@example('"\\')
@example("%YAML 9.9\n---\na")
@example("? |\n  a\n: b")
def test_any_text_is_a_job_or_an_error_of_ours(text: str) -> None:
    for name in ("job.yaml", "job.json"):
        with pytest.raises(ManifestError) as caught:
            parse_manifest(text, name=name, base=BASE)
        check_lines(str(caught.value))


WORDS = "a b: c - , [ ] { } : # & * ! | > ' \" % @ ` ? ~ \\ \\x41 \\ud800 --- ... << !!str &a *a 1 .nan yes"
PIECES = st.sampled_from([*WORDS.split(), " ", "\n", "\n  ", "\t", "spec", "recipe", "weights", "bits", ": "])


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=40))
def test_any_punctuation_is_an_error_of_ours(pieces: list[str]) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest("".join(pieces), name="job.yaml", base=BASE)
    check_lines(str(caught.value))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

PATHS = st.sampled_from(
    [
        "metadata",
        "metadata.labels",
        "spec",
        "spec.model",
        "spec.calibration",
        "spec.calibration.source",
        "spec.calibration.source.kind",
        "spec.recipe",
        "spec.recipe.weights",
        "spec.recipe.weights.quantizer",
        "spec.recipe.compensation",
        "spec.recipe.compensation.rank",
        "spec.recipe.overrides",
        "spec.recipe.overrides.0",
        "spec.recipe.keep",
        "spec.validation.text",
        "spec.validation.gates",
        "spec.resources.gpus_per_worker",
        "spec.output.uri",
    ]
)


@settings(max_examples=300, deadline=None)
@given(path=PATHS, value=VALUES)
def test_any_value_in_any_place_is_taken_or_refused_by_name(path: str, value: object) -> None:
    top, *_ = path.split(".")
    try:
        job(FULL, f"{path}={json.dumps(value)}")
        found = f"{top}: accepted"
    except ManifestError as refusal:
        found = str(refusal)
    check_lines(found)
    assert all(line.startswith((f"{top}.", f"{top}: ", "... and ")) for line in found.split("\n"))
