"""A batch's manifest: which jobs it asks for, how they are called, and what is said of one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from counterweight.pipeline.manifest import batch_schema, load_manifest, load_submission, schema_text
from counterweight.pipeline.manifest.batch import BatchSpec, combinations, name_under, overrides
from counterweight.workers.errors import ManifestError
from tests.pipeline.manifest_documents import FULL, MINIMAL, check_lines

PATIENT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""

RANK, BITS = "spec.recipe.compensation.rank.count", "spec.recipe.weights.bits"


def spec(**parts: Any) -> BatchSpec:
    return BatchSpec.model_validate_json(json.dumps({"jobs": ["job.yaml"], **parts}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(FULL)
    (tmp_path / "small.yaml").write_text(MINIMAL)
    return tmp_path


def write_batch(folder: Path, **parts: Any) -> str:
    document = {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionBatch",
        "metadata": {"name": "nightly"},
        "spec": {"jobs": ["job.yaml"], **parts},
    }
    (folder / "batch.json").write_text(json.dumps(document))
    return str(folder / "batch.json")


class TestCombinations:
    def test_are_all_of_the_matrix_the_last_field_fastest(self) -> None:
        found = combinations(spec(matrix={RANK: [1, 2], BITS: [3, 4]}))
        assert [tuple(one.values()) for one in found] == [(1, 3), (1, 4), (2, 3), (2, 4)]

    def test_are_a_single_empty_one_without_a_matrix(self) -> None:
        assert combinations(spec()) == [{}]

    def test_leave_out_what_has_all_values_of_an_exclude(self) -> None:
        found = combinations(spec(matrix={RANK: [1, 2], BITS: [3, 4]}, exclude=[{RANK: 1, BITS: 4}, {RANK: 2}]))
        assert found == [{RANK: 1, BITS: 3}]

    def test_end_with_what_is_included_once_each(self) -> None:
        found = combinations(spec(matrix={RANK: [1]}, include=[{RANK: 7, BITS: 8}, {RANK: 1}, {RANK: 7, BITS: 8}]))
        assert found == [{RANK: 1}, {RANK: 7, BITS: 8}]
        assert combinations(spec(include=[{RANK: 7}])) == [{RANK: 7}]

    def test_tell_one_from_true(self) -> None:
        field = "metadata.labels"
        assert len(combinations(spec(matrix={field: [1, True, "1"]}))) == 3
        assert combinations(spec(matrix={field: [1, True]}, exclude=[{field: True}])) == [{field: 1}]

    @PATIENT
    @given(
        st.dictionaries(
            st.sampled_from([RANK, BITS, "spec.calibration.seed"]), st.lists(st.integers(0, 3), min_size=1, max_size=6)
        ),
        st.lists(st.integers(0, 3), max_size=4),
    )
    def test_are_the_product_less_the_excludes(self, matrix: dict[str, list[int]], excluded: list[int]) -> None:
        excludes = [{field: value} for field in list(matrix)[:1] for value in excluded]
        kept = [value for value in dict.fromkeys(next(iter(matrix.values()), [])) if value not in excluded]
        expected = len(kept) if matrix else 1
        for values in list(matrix.values())[1:]:
            expected *= len(set(values))
        if expected:
            found = combinations(spec(matrix=matrix, exclude=excludes))
            assert len(found) == expected
            assert len({json.dumps(one) for one in found}) == expected
        else:
            with pytest.raises(ValueError, match="0 jobs"):
                spec(matrix=matrix, exclude=excludes)

    def test_as_overrides_are_what_set_reads(self) -> None:
        assert overrides({RANK: 16, "spec.recipe.keep": ["lm_head"]}) == [
            f"{RANK}=16",
            'spec.recipe.keep=["lm_head"]',
        ]


class TestNames:
    def test_say_what_differs(self) -> None:
        assert name_under("llama", {RANK: 16, BITS: 4}) == "llama-rank-count-16-weights-bits-4"
        assert name_under("llama", {}) == "llama"
        assert name_under("llama", {RANK: 16, "metadata.name": "mine"}) == "mine"

    @PATIENT
    @given(
        st.dictionaries(
            st.sampled_from([RANK, BITS, "spec.model.uri", "metadata.labels.x"]), st.text() | st.integers() | st.none()
        )
    )
    def test_are_names_however_odd_the_values(self, settings: dict[str, Any]) -> None:
        name = name_under("a" * 40, settings)
        assert len(name) <= 63
        assert not name.endswith("-")
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


class TestSubmissions:
    def test_of_a_job_are_that_job(self, folder: Path) -> None:
        found = load_submission(str(folder / "job.yaml"), ["spec.calibration.seed=5"], "file:///elsewhere")
        assert found.batch is None
        (only,) = found.jobs
        assert only.job.spec.calibration.seed == 5
        assert only.job.spec.output.uri == "file:///elsewhere"

    def test_of_a_batch_are_each_job_under_each_setting(self, folder: Path) -> None:
        found = load_submission(write_batch(folder, jobs=["job.yaml", "small.yaml"], matrix={BITS: [3, 4]}))
        assert [one.job.metadata.name for one in found.jobs] == [
            "full-weights-bits-3",
            "full-weights-bits-4",
            "small-weights-bits-3",
            "small-weights-bits-4",
        ]
        assert {one.job.spec.model.uri for one in found.jobs} == {(folder / "model").as_uri()}
        assert [one.job.spec.recipe.weights.bits for one in found.jobs] == [3, 4, 3, 4]

    def test_of_a_batch_take_changes_of_the_batch_and_the_output_of_all(self, folder: Path) -> None:
        found = load_submission(write_batch(folder), ["spec.concurrency=7"], "file:///elsewhere")
        assert found.batch is not None
        assert found.batch.spec.concurrency == 7
        assert found.jobs[0].job.spec.output.uri == "file:///elsewhere"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"jobs": []}, "spec.jobs"),
        ({"jobs": ["absent.yaml"]}, "spec.jobs.0"),
        ({"jobs": ["gs://x/y.yaml"]}, "spec.jobs.0"),
        ({"matrix": {BITS: [3, 9]}}, "spec.jobs.0: spec.recipe.weights.bits: 9"),
        ({"matrix": {"spec.nothing": [1]}}, "spec.jobs.0: spec.nothing: unknown key"),
        ({"matrix": {BITS: []}}, "spec.matrix"),
        ({"matrix": {"apiVersion": ["x"]}}, "spec.matrix"),
        ({"exclude": [{BITS: 3}]}, "expected a field of the matrix"),
        ({"matrix": {BITS: [3]}, "exclude": [{BITS: 3}]}, "0 jobs in all"),
        ({"matrix": {BITS: list(range(40)), RANK: list(range(40))}}, "1600 combinations"),
        ({"concurrency": 0}, "spec.concurrency: 0"),
        ({"max_failures": -1}, "spec.max_failures: -1"),
        ({"maxFailures": 1}, "spec.maxFailures: unknown key"),
        ({"jobs": ["job.yaml", "job.yaml"]}, "two jobs are called 'full'"),
        ({"matrix": {"spec.model.uri": ["%", "!"]}}, "two jobs are called"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_batch_is_refused_by_name(folder: Path, parts: dict[str, Any], expected: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_submission(write_batch(folder, **parts))
    assert expected in str(caught.value)
    check_lines(str(caught.value))


def test_run_says_what_a_batch_is_for(folder: Path) -> None:
    with pytest.raises(ManifestError, match="a batch is for `counterweight submit`") as caught:
        load_manifest(write_batch(folder))
    assert "\n" not in str(caught.value)


def test_the_schema_is_of_both_kinds(folder: Path) -> None:
    schema = json.loads(schema_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    write_batch(folder, matrix={RANK: [16, 32]}, max_failures=1)
    batch = json.loads((folder / "batch.json").read_text())
    assert validator.is_valid(batch)
    assert not validator.is_valid({**batch, "kind": "CompressionJob"})
    assert not validator.is_valid({**batch, "spec": {**batch["spec"], "jobs": []}})
    assert not validator.is_valid({**batch, "spec": {**batch["spec"], "matrix": {RANK: 3}}})
    Draft202012Validator.check_schema(batch_schema())
