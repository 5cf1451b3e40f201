"""What is said about wrong manifests and overrides: the field, its value and what was expected."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.pipeline.manifest_documents import FULL, MINIMAL, job, refused


class TestErrors:
    """Each line names the field, its value and what was expected."""

    @pytest.mark.parametrize(
        ("override", "line"),
        [
            ("spec.recipe.weights.bits=9", "spec.recipe.weights.bits: 9: expected 2, 3, 4 or 8"),
            (
                "spec.recipe.weights.quantizer.kind=gtpq",
                "spec.recipe.weights.quantizer.kind: 'gtpq': expected gptq or rtn",
            ),
            (
                "spec.recipe.weights.quantizer={}",
                "spec.recipe.weights.quantizer.kind: missing: expected gptq or rtn",
            ),
            (
                "spec.recipe.weights.quantizer=gptq",
                "spec.recipe.weights.quantizer: 'gptq': expected a mapping with kind",
            ),
            (
                "spec.calibration.sequences=0",
                "spec.calibration.sequences: 0: expected an integer from 1 to 1000000",
            ),
            (
                "spec.calibration.segment_blocks=0",
                "spec.calibration.segment_blocks: 0: expected an integer from 1 to 10000 or null",
            ),
            (
                "spec.calibration={source: {uri: a.txt}, segment_blocks: 2}",
                "spec.calibration: segment_blocks: 2: expected null with propagate: original",
            ),
            (
                "spec.calibration.seed=-1",
                "spec.calibration.seed: -1: expected an integer from 0 to 4294967295",
            ),
            (
                "spec.calibration.sampling=any",
                "spec.calibration.sampling: 'any': expected random or consecutive",
            ),
            ("spec.calibration.source.uri=5", "spec.calibration.source.uri: 5: expected a string"),
            (
                "spec.calibration.source={kind: text}",
                "spec.calibration.source.uri: missing: expected a string",
            ),
            (
                "spec.calibration.source.kind=file",
                "spec.calibration.source.kind: 'file': expected dataset, model, standard_library, text or tokens",
            ),
            ("spec.calibration.source.kind=[a]", "spec.calibration.source.kind: ['a']: expected dataset, "),
            (
                "spec.calibration.source=text.txt",
                "spec.calibration.source: 'text.txt': expected a mapping with kind ",
            ),
            (
                "spec.calibration.source={kind: dataset, path: a, rows: 0}",
                "spec.calibration.source.rows: 0: expected an integer from 1 to 1000000000 or null",
            ),
            ("spec.recipe.activations.bits=5", "spec.recipe.activations.bits: 5: expected 4, 6 or 8"),
            (
                "spec.recipe.overrides.0.weights.bits=5",
                "spec.recipe.overrides.0.weights.bits: 5: expected 2, 3, 4 or 8",
            ),
            (
                "spec.recipe.overrides=[{match: a}]",
                "spec.recipe.overrides.0: an override must set weights or",
            ),
            ("spec.recipe.overrides=5", "spec.recipe.overrides: 5: expected a list"),
            ("spec.recipe.keep=[embed]", "spec.recipe.keep: ['embed']: expected a pattern for lm_head"),
            ("spec.recipe.keep=[]", "spec.recipe.keep: []: expected a pattern for lm_head"),
            ("spec.recipe.keep=['']", "spec.recipe.keep.0: '': expected a string of 1 to 200 characters"),
            (
                "spec.validation.gates.kl=0",
                "spec.validation.gates.kl: 0: expected a number above 0 and up to 1000000, or null",
            ),
            (
                "spec.validation.windows=0",
                "spec.validation.windows: 0: expected an integer from 1 to 10000000 or null",
            ),
            ("spec.validation=[]", "spec.validation: []: expected a mapping with text"),
            (
                "spec.resources.gpus_per_worker=1.5",
                "spec.resources.gpus_per_worker: 1.5: expected 0, a share of a GPU from 0.01 to 1, or ",
            ),
            (
                "spec.resources.gpus_per_worker=0.001",
                "spec.resources.gpus_per_worker: 0.001: expected 0, a share",
            ),
            (
                "spec.resources.workers=100000",
                "spec.resources.workers: 100000: expected an integer from 1 to 10000",
            ),
            (
                "spec.resources.cpus_per_worker=0",
                "spec.resources.cpus_per_worker: 0: expected an integer from 1 to 1024 or null",
            ),
            (
                "metadata.name=Big_Name",
                "metadata.name: 'Big_Name': expected 1 to 63 lower-case letters, digits and '-'",
            ),
            (f"metadata.name={'a' * 64}", "metadata.name: 'aaaaaaaaaa"),
            ("metadata.labels={a: 1}", "metadata.labels.a: 1: expected a string of 0 to 200 characters"),
            ("metadata.labels={'a b': x}", "metadata.labels.'a b': bad key: expected one like ^[A-Za-z0-9]"),
            ("apiVersion=v2", "apiVersion: 'v2': expected counterweight/v1"),
            (
                "kind=CompressionBatch",
                "kind: 'CompressionBatch': expected 'CompressionJob': a batch is for `counterweight submit`",
            ),
            ("spec.model=", "spec.model: null: expected a mapping with uri"),
            ("spec.output={}", "spec.output.uri: missing: expected a string of 1 to 2000 characters"),
        ],
    )
    def test_a_wrong_value(self, override: str, line: str) -> None:
        found = refused(FULL, override)
        assert found.startswith(line)
        assert "\n" not in found

    @pytest.mark.parametrize(
        ("override", "line"),
        [
            (
                "spec.recipe.compensation.rank={count: 0}",
                "spec.recipe.compensation.rank.count: 0: expected an integer",
            ),
            (
                "spec.recipe.compensation.rank={count: '4'}",
                "spec.recipe.compensation.rank.count: '4': expected an",
            ),
            (
                "spec.recipe.compensation.rank={fraction: 2}",
                "spec.recipe.compensation.rank.fraction: 2: expected a",
            ),
            ("spec.recipe.compensation.rank={}", "spec.recipe.compensation.rank: {}: expected a mapping"),
            ("spec.recipe.compensation.rank={cuont: 4}", "spec.recipe.compensation.rank"),
            ("spec.recipe.compensation.rank.fraction=0.5", "spec.recipe.compensation.rank"),
            ("spec.recipe.compensation.rank=4", "spec.recipe.compensation.rank: 4: expected a mapping"),
            (
                "spec.recipe.compensation={kind: svd, rank: null}",
                "spec.recipe.compensation.rank: null: expected a mapping with fraction, count, energy or budget_bits",
            ),
        ],
    )
    def test_a_wrong_rank(self, override: str, line: str) -> None:
        found = refused(FULL, override)
        assert found.startswith(line)
        assert "Rank" not in found, "the names of our classes mean nothing to the author"

    @pytest.mark.parametrize(
        "path",
        [
            "surplus",
            "metadata.surplus",
            "spec.surplus",
            "spec.model.surplus",
            "spec.calibration.surplus",
            "spec.calibration.source.surplus",
            "spec.recipe.surplus",
            "spec.recipe.weights.surplus",
            "spec.recipe.weights.quantizer.surplus",
            "spec.recipe.activations.surplus",
            "spec.recipe.compensation.surplus",
            "spec.recipe.overrides.0.surplus",
            "spec.recipe.overrides.0.weights.surplus",
            "spec.validation.surplus",
            "spec.validation.text.surplus",
            "spec.validation.gates.surplus",
            "spec.resources.surplus",
            "spec.output.surplus",
        ],
    )
    def test_an_unknown_key_at_each_level(self, path: str) -> None:
        found = refused(FULL, f"{path}=1")
        assert found.startswith(f"{path}: unknown key; expected ")
        assert found.endswith(f" (with --set {path})")
        assert "\n" not in found

    def test_an_unknown_key_is_told_its_neighbours(self) -> None:
        found = refused(MINIMAL.replace("weights:", "weigths:"))
        known = "transforms, weights, activations, compensation, tuning, residual, overrides, keep"
        missing, unknown = found.splitlines()
        assert missing.startswith("spec.recipe.weights: missing: expected a mapping")
        assert unknown == f"spec.recipe.weigths: unknown key; expected one of {known}; did you mean weights?"

    @pytest.mark.parametrize("path", ["apiVersion", "kind", "metadata", "spec", "spec.model", "spec.recipe"])
    def test_a_missing_key_at_each_level(self, path: str) -> None:
        *parents, key = path.split(".")
        document: dict[str, Any] = json.loads(job(MINIMAL).model_dump_json())
        holder = document
        for parent in parents:
            holder = holder[parent]
        del holder[key]
        found = refused(json.dumps(document), name="job.json")
        assert found.startswith(f"{path}: missing: expected ")

    def test_all_problems_are_told_at_once_in_order(self) -> None:
        found = refused(FULL, "spec.calibration.seed=-1", "spec.recipe.weights.bits=9", "spec.resources.workers=0")
        assert [line.partition(":")[0] for line in found.splitlines()] == [
            "spec.calibration.seed",
            "spec.recipe.weights.bits",
            "spec.resources.workers",
        ]

    def test_at_most_twenty_lines(self) -> None:
        twenty = refused(FULL, f"spec.recipe.keep={list(range(20))}")
        assert len(twenty.splitlines()) == 20
        assert "more" not in twenty
        lines = refused(FULL, f"spec.recipe.keep={list(range(50))}").splitlines()
        assert len(lines) == 20
        assert lines[-1] == "... and 31 more problems"

    def test_long_values_are_cut_and_odd_ones_escaped(self) -> None:
        line = refused(FULL, f"spec.calibration.sampling={'x' * 5000}")
        assert line.startswith("spec.calibration.sampling: 'xxxx")
        assert len(line) < 250
        assert "\n" not in refused(FULL, r'spec.calibration.sampling="a\nb\e[31m"')
        assert "\x1b" not in refused(FULL, r'spec={"a\nb\e[31m": 1}')


class TestOverrides:
    def test_they_replace_add_and_remove(self) -> None:
        changed = job(
            FULL,
            "spec.recipe.weights.bits=3",
            "spec.recipe.overrides.0.match='*.up_proj'",
            "spec.recipe.compensation={kind: svd, rank: {fraction: 0.5}}",
            "spec.validation=",
            "metadata.labels={a.b/c: d}",
        )
        assert changed.spec.recipe.weights.bits == 3
        assert changed.spec.recipe.overrides[0].match == "*.up_proj"
        assert changed.spec.recipe.compensation != job(FULL).spec.recipe.compensation
        assert changed.spec.validation is None
        assert changed.metadata.labels == {"a.b/c": "d"}

    def test_they_make_the_mappings_on_the_way(self) -> None:
        changed = job(
            MINIMAL,
            "spec.validation.text.uri=t.txt",
            "spec.validation.gates.kl=1",
            "spec.resources.workers=4",
        )
        assert changed.spec.resources.workers == 4
        assert changed.spec.validation is not None
        assert changed.spec.validation.gates.kl == 1.0

    def test_a_later_one_wins_and_values_may_hold_equals_signs(self) -> None:
        assert job(MINIMAL, "spec.calibration.seed=1", "spec.calibration.seed=2").spec.calibration.seed == 2
        assert job(MINIMAL, "spec.model.uri=a=b").spec.model.uri == "file:///jobs/a%3Db"

    @pytest.mark.parametrize(
        ("override", "line"),
        [
            ("spec.recipe.weigths.bits=3", "spec.recipe.weigths: unknown key; expected one of transforms, weights, "),
            (
                "spec.recipe.keep.1=a",
                "--set spec.recipe.keep.1: spec.recipe.keep is a list of 1: '1': expected an index",
            ),
            (
                "spec.recipe.keep.-1=a",
                "--set spec.recipe.keep.-1: spec.recipe.keep is a list of 1: '-1': expected",
            ),
            (
                "spec.recipe.keep.x=a",
                "--set spec.recipe.keep.x: spec.recipe.keep is a list of 1: 'x': expected",
            ),
            (
                "metadata.name.x=a",
                "--set metadata.name.x: metadata.name is 'full': expected a mapping or a list",
            ),
            ("spec", "--set 'spec': expected path=value"),
            ("=3", "--set '=3': expected path=value"),
            ("spec..model=3", "--set 'spec..model=3': expected path=value"),
            ("spec.model.uri=@x", "--set spec.model.uri: line 1, column 1: not YAML: "),
            ("spec.model.uri=&a x", "spec.model.uri: line 1: an anchor (&): expected none"),
            ("spec.validation.gates.kl=.nan", "spec.validation.gates.kl: .nan: expected a finite number"),
            ("spec.model={uri: a, uri: b}", "spec.model.uri: line 1: key given twice"),
        ],
    )
    def test_a_wrong_one_names_its_path(self, override: str, line: str) -> None:
        assert refused(FULL, override).startswith(line)

    def test_a_problem_of_the_manifest_is_not_blamed_on_them(self) -> None:
        text = FULL.replace("seed: 1", "seed: -1")
        assert "--set" not in refused(text, "spec.recipe.weights.bits=3")
