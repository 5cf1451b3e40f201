"""The manifest: what it means, and which of its fields determine the result."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
from pydantic import ValidationError

from counterweight.pipeline.manifest import (
    Calibration,
    CompressionJob,
    Gates,
    Resources,
    canonical,
    parse_manifest,
)
from counterweight.workers.calibration.source import TextSource, TokensSource
from tests.pipeline.manifest_documents import BASE, FULL, MINIMAL, job, refused


class TestMeaning:
    def test_the_smallest_manifest_has_the_documented_defaults(self) -> None:
        spec = job(MINIMAL).spec
        assert spec.calibration == Calibration(
            source=TextSource(uri="file:///jobs/text.txt"),
            sequences=128,
            sequence_length=2048,
            sampling="random",
            seed=0,
            propagate="original",
            compute_dtype="float32",
        )
        assert spec.validation is None
        assert spec.validation_sequence_length is None
        assert spec.resources == Resources(workers=1, gpus_per_worker=0.0, cpus_per_worker=None)
        assert spec.recipe.compensation.kind == "none"
        assert job(MINIMAL).metadata.labels == {}

    def test_every_value_arrives(self) -> None:
        full = job(FULL)
        assert full.metadata.labels == {"team": "a"}
        calibration, recipe, validation = full.spec.calibration, full.spec.recipe, full.spec.validation
        assert (calibration.sequences, calibration.sequence_length, calibration.seed) == (8, 64, 1)
        assert (calibration.sampling, calibration.propagate) == ("consecutive", "compressed")
        assert calibration.compute_dtype == "bfloat16"
        assert (recipe.weights.bits, recipe.weights.group_size) == (4, 32)
        assert recipe.overrides[0].match == "*.down_proj"
        assert validation is not None
        assert (validation.windows, validation.sequence_length) == (4, 32)
        assert validation.gates == Gates(perplexity_ratio=1.1, kl=0.5)
        assert full.spec.resources == Resources(workers=2, gpus_per_worker=0.5, cpus_per_worker=3)

    def test_validation_windows_are_as_long_as_the_calibrations_unless_said(self) -> None:
        assert job(FULL).spec.validation_sequence_length == 32
        assert job(FULL, "spec.validation.sequence_length=").spec.validation_sequence_length == 64

    def test_a_source_without_a_kind_is_a_text_and_others_say_so(self) -> None:
        assert isinstance(job(MINIMAL).spec.calibration.source, TextSource)
        tokens = job(MINIMAL, "spec.calibration.source={kind: tokens, uri: t.safetensors}")
        assert isinstance(tokens.spec.calibration.source, TokensSource)

    def test_a_job_is_frozen_and_survives_json(self) -> None:
        full = job(FULL)
        with pytest.raises(ValidationError, match="frozen"):
            full.spec.resources.__setattr__("workers", 3)
        assert CompressionJob.model_validate_json(full.model_dump_json()) == full

    def test_python_callers_get_no_conversions_either(self) -> None:
        with pytest.raises(ValidationError, match="sequences"):
            Calibration.model_validate({"source": {"uri": "x"}, "sequences": "4"})

    def test_json_and_yaml_mean_the_same(self) -> None:
        document = {
            "apiVersion": "counterweight/v1",
            "kind": "CompressionJob",
            "metadata": {"name": "small"},
            "spec": {
                "model": {"uri": "model"},
                "calibration": {"source": {"uri": "text.txt"}},
                "recipe": {"weights": {"bits": 4}},
                "output": {"uri": "out"},
            },
        }
        for indent in (None, "\t"):
            text = json.dumps(document, indent=indent)
            assert parse_manifest(text, name="job.json", base=BASE).job == job(MINIMAL)

    def test_escaped_pairs_are_one_character_in_both(self) -> None:
        face = "\N{GRINNING FACE}"
        for name, text in (("job.yaml", MINIMAL), ("job.json", job(MINIMAL).model_dump_json())):
            override = f"metadata.labels.face={json.dumps(face)}"
            parsed = parse_manifest(text, name=name, base=BASE, overrides=[override]).job
            assert parsed.metadata.labels == {"face": face}
            again = json.dumps(parsed.model_dump(mode="json"))
            assert parse_manifest(again, name=name, base=BASE).job == parsed

    def test_bytes_may_begin_with_a_byte_order_mark(self) -> None:
        data = b"\xef\xbb\xbf" + MINIMAL.encode()
        assert parse_manifest(data, name="job.yaml", base=BASE).job == job(MINIMAL)


class TestScalars:
    """YAML 1.2 without surprises: what looks like a string is one."""

    @pytest.mark.parametrize(
        "written",
        [
            "no",
            "yes",
            "on",
            "off",
            "y",
            "2024-01-01",
            "012",
            "0x1F",
            "0o17",
            "1_000",
            "12:30",
            "1e",
            "nan",
            "'5'",
        ],
    )
    def test_strings_stay_strings(self, written: str) -> None:
        assert job(MINIMAL, f"metadata.labels.a={written}").metadata.labels == {"a": written.strip("'")}

    @pytest.mark.parametrize("written", ["no", "1", "'true'", "null", "0.0"])
    def test_only_booleans_are_booleans(self, written: str) -> None:
        line = refused(FULL, f"spec.recipe.weights.symmetric={written}")
        assert line.startswith("spec.recipe.weights.symmetric: ")
        assert "expected true or false" in line

    @pytest.mark.parametrize("written", ["true", "True", "TRUE"])
    def test_booleans(self, written: str) -> None:
        assert job(FULL, f"spec.recipe.weights.symmetric={written}").spec.recipe.weights.symmetric is True

    @pytest.mark.parametrize(
        "written", ["'4'", "4.0", "true", "null", "0x4", "04", "4e0", "[4]", "{a: 4}", "2024-01-01", "1:30"]
    )
    def test_only_integers_are_integers(self, written: str) -> None:
        line = refused(FULL, f"spec.calibration.sequences={written}")
        assert line.startswith("spec.calibration.sequences: ")
        assert "expected an integer from 1 to 1000000" in line

    @pytest.mark.parametrize(("written", "value"), [("2", 2.0), ("1e-1", 0.1), (".5", 0.5), ("3.", 3.0)])
    def test_numbers(self, written: str, value: float) -> None:
        validation = job(FULL, f"spec.validation.gates.kl={written}").spec.validation
        assert validation is not None
        assert validation.gates.kl == value

    @pytest.mark.parametrize("written", ["'0.5'", "true", "1.5.2", "0,5"])
    def test_only_numbers_are_numbers(self, written: str) -> None:
        assert "expected a number above 0" in refused(FULL, f"spec.validation.gates.kl={written}")


class TestCanonical:
    @pytest.mark.parametrize(
        "override",
        [
            "spec.calibration.sequences=9",
            "spec.calibration.sequence_length=65",
            "spec.calibration.sampling=random",
            "spec.calibration.seed=2",
            "spec.calibration.propagate=original",
            "spec.calibration.compute_dtype=float32",
            "spec.recipe.weights.bits=3",
            "spec.recipe.weights.group_size=64",
            "spec.recipe.weights.quantizer.kind=rtn",
            "spec.recipe.activations=",
            "spec.recipe.compensation.rank.count=5",
            "spec.recipe.overrides=[]",
            "spec.recipe.keep=[lm_head, '*.up_proj']",
            "spec.validation=",
            "spec.validation.windows=5",
            "spec.validation.sequence_length=33",
            "spec.validation.gates.kl=0.6",
            "spec.validation.prefill_gates={}",
        ],
    )
    def test_what_determines_the_result(self, override: str) -> None:
        assert canonical(job(FULL, override)) != canonical(job(FULL))

    @pytest.mark.parametrize(
        "override",
        [
            "metadata.name=other",
            "metadata.labels={}",
            "spec.model.uri=elsewhere",
            "spec.calibration.source.uri=elsewhere",
            "spec.calibration.source={kind: standard_library, part: train}",
            "spec.validation.text.uri=elsewhere",
            "spec.resources={workers: 9}",
            "spec.output.uri=elsewhere",
            "spec.recipe.keep=[lm_head]",
            "spec.validation.gates.perplexity_ratio=1.10",
        ],
    )
    def test_what_does_not(self, override: str) -> None:
        assert canonical(job(FULL, override)) == canonical(job(FULL))

    def test_a_default_written_out_is_one_left_out(self) -> None:
        written = job(MINIMAL, "spec.calibration.sequences=128", "spec.recipe.weights.quantizer={kind: gptq}")
        assert canonical(written) == canonical(job(MINIMAL))
        assert canonical(job(FULL, "spec.validation.sequence_length=64")) == canonical(
            job(FULL, "spec.validation.sequence_length=")
        )

    def test_what_artifacts_are_called_does_not_change_with_what_is_younger(self) -> None:
        """Digests that were taken before there were further texts, bounds, special tokens and the youngest metrics."""
        assert sha256(canonical(job(FULL))).hexdigest() == (
            "8b024f148472b997e4a6801d7ffd1f0553f97b2b169cf4259fb2685b73791f18"
        )
        assert sha256(canonical(job(MINIMAL))).hexdigest() == (
            "dd7a008635b95c9d2f6f1a13d53ae3959dcd4dbb4ab3dfad0e8912661374291d"
        )
        for younger in (
            "spec.validation.gates.kl_last_quarter=0.5",
            "spec.validation.texts={code: {source: {uri: code.txt}}}",
            "spec.validation.bounds=[{metric: kl, at_most: 0.5}]",
        ):
            assert canonical(job(FULL, younger)) != canonical(job(FULL))
        assert canonical(job(FULL, "spec.validation.special_tokens=window")) == canonical(
            job(FULL)
        )  # the tokens say it

    def test_it_is_sorted_json_without_spaces(self) -> None:
        content = json.loads(canonical(job(FULL)))
        assert list(content) == ["apiVersion", "calibration", "recipe", "validation"]
        assert "prefill_gates" not in content["validation"], "ids that were made before it stay"
        assert canonical(job(FULL)) == json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
