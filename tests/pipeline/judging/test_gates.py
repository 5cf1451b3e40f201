"""Bounds for publication: what each means, how it is said, and what refuses to be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from counterweight.pipeline.artifact.report import Quality, Report, TextReport, TokensReport
from counterweight.pipeline.artifact.verdict import GateReport, GenerationReport
from counterweight.pipeline.judging.gates import base_model_problem, check, judge
from counterweight.pipeline.judging.paired import bootstrap
from counterweight.pipeline.judging.rivals import read_report, read_rivals
from counterweight.pipeline.manifest import FurtherText, Gates, Validation
from counterweight.pipeline.manifest.validation import Bound
from counterweight.pipeline.tokens import read_tokens
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.errors import GateError, ManifestError, RequestError
from counterweight.workers.metrics import METRICS
from tests.models import VOCABULARY, write_text
from tests.pipeline.tiny import Events, job_of, local_path, run_local, write_job

ORIGINAL = Quality(perplexity=10.0, kl=0.0, top1_agreement=1.0)
BAD = Quality(perplexity=1e9, kl=1e9, top1_agreement=0.0)
SOURCE = TextSource(uri="file:///text.txt")


def measured(
    compensated: Quality, *, original: Quality = ORIGINAL, quantized: Quality = BAD, prefill: Quality | None = None
) -> TextReport:
    return TextReport(
        tokens=TokensReport(source={}, sequences=1, sequence_length=8, digest="0" * 64),
        baseline=original,
        quantized=quantized,
        compensated=compensated,
        compensated_prefill=prefill,
    )


def validation(**fields: object) -> Validation:
    return Validation.model_validate({"text": SOURCE, **fields})


def judged(compensated: TextReport, further: TextReport | None = None, **fields: object) -> tuple[GateReport, ...]:
    texts = {"text": compensated} | ({} if further is None else {"code": further})
    named = {"texts": {"code": FurtherText(source=SOURCE)}} if further is not None else {}
    return judge(validation(**named, **fields), texts)


def served(perplexity: float = 11.0, kl: float = 0.1) -> Quality:
    return Quality(perplexity=perplexity, kl=kl, top1_agreement=0.9)


@pytest.mark.parametrize(
    "gates",
    [Gates(), Gates(perplexity_ratio=1.1), Gates(kl=0.1), Gates(perplexity_ratio=1.5, kl=1.0)],
)
def test_a_model_within_its_bounds_passes(gates: Gates) -> None:
    check(judged(measured(served()), gates=gates))


def test_a_gate_names_what_was_measured_and_what_was_allowed() -> None:
    with pytest.raises(GateError) as caught:
        check(judged(measured(served()), gates=Gates(perplexity_ratio=1.05, kl=0.05)))
    assert str(caught.value).splitlines() == [
        "spec.validation.gates.perplexity_ratio: 1.1000 (perplexity 11.0000, original 10.0000): expected at most 1.05",
        "spec.validation.gates.kl: 0.10000: expected at most 0.05",
    ]


def test_every_metric_has_its_gate() -> None:
    """Absolute or relative, at most or at least."""
    original = Quality.model_validate({**ORIGINAL.model_dump(), "kl_p99": 0.0})
    model = measured(Quality.model_validate({**served().model_dump(), "kl_p99": 0.7}), original=original)
    check(judged(model, gates=Gates(kl_p99=0.7, top1_agreement=0.9)))
    with pytest.raises(GateError) as caught:
        check(judged(model, gates=Gates(kl_p99=0.6, top1_agreement=0.95)))
    assert str(caught.value).splitlines() == [
        "spec.validation.gates.kl_p99: 0.70000: expected at most 0.6",
        "spec.validation.gates.top1_agreement: 0.9000: expected at least 0.95",
    ]
    assert {metric.gate for metric in METRICS} == set(Gates.model_fields)


def test_one_gate_alone_is_enough() -> None:
    with pytest.raises(GateError, match=r"^spec.validation.gates.kl: "):
        check(judged(measured(served()), gates=Gates(perplexity_ratio=2.0, kl=0.05)))


def test_what_is_no_number_reaches_no_gate() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Quality(perplexity=float("nan"), kl=0.0, top1_agreement=0.0)


def test_gates_look_at_decoding_and_gates_for_prefill_at_prefill() -> None:
    """Without residual stores both are one model."""
    plain, stored = measured(served(11.0)), measured(served(11.0), prefill=served(12.0))
    strict, loose = Gates(perplexity_ratio=1.15), Gates(perplexity_ratio=1.25)
    check(judged(stored, gates=strict))
    check(judged(stored, gates=strict, prefill_gates=loose))
    check(judged(plain, gates=strict, prefill_gates=strict))
    with pytest.raises(GateError) as caught:
        check(judged(stored, prefill_gates=strict))
    assert str(caught.value) == (
        "spec.validation.prefill_gates.perplexity_ratio: 1.2000 (perplexity 12.0000, original 10.0000): expected at most 1.15"
    )
    with pytest.raises(GateError, match=r"^spec.validation.prefill_gates.kl: 0.10000: expected at most 0.05$"):
        check(judged(plain, prefill_gates=Gates(kl=0.05)))


@pytest.mark.parametrize(
    ("bound", "beyond", "said"),
    [
        ({"metric": "perplexity", "at_most": 10.5}, 0.5, "11.0000: expected at most 10.5"),
        ({"metric": "top1_agreement", "at_least": 0.95}, 0.05, "0.9000: expected at least 0.95"),
        (
            {"metric": "perplexity", "max_ratio": 1.05},
            0.05,
            "1.1000 (perplexity 11.0000, original 10.0000): expected at most 1.05",
        ),
        (
            {"metric": "perplexity", "max_drop": 0.25},
            0.75,
            "1.0000 worse (perplexity 11.0000, original 10.0000): expected at most 0.25",
        ),
        (
            {"metric": "top1_agreement", "max_drop": 0.04},
            0.06,
            "0.1000 worse (top-1 agreement 0.9000, original 1.0000): expected at most 0.04",
        ),
    ],
)
def test_each_kind_of_bound_says_by_how_much(bound: dict[str, object], beyond: float, said: str) -> None:
    (gate,) = judged(measured(served()), bounds=(Bound.model_validate(bound),))
    kind = next(name for name in bound if name != "metric")
    assert not gate.passed
    assert gate.beyond == pytest.approx(beyond)
    assert (gate.field, gate.said) == (f"spec.validation.bounds.0.{kind}", said)


def test_a_bound_is_on_the_text_and_the_model_that_it_names() -> None:
    on_text = measured(served(11.0), quantized=served(12.0))
    on_code = measured(served(13.0), quantized=served(14.0), prefill=served(13.5))
    for text, variant, value in (
        ("text", "compensated", 11.0),
        ("text", "quantized", 12.0),
        ("text", "compensated_prefill", 11.0),
        ("code", "compensated", 13.0),
        ("code", "quantized", 14.0),
        ("code", "compensated_prefill", 13.5),
    ):
        bound = Bound.model_validate({"metric": "perplexity", "text": text, "variant": variant, "at_most": 1.0})
        (gate,) = judged(on_text, on_code, bounds=(bound,))
        assert gate.measured == value
        assert gate.said.endswith("on 'code': expected at most 1") == (text == "code")


@pytest.mark.parametrize(("drops", "passed"), [((0.1, 0.2, 0.1, 0.2) * 4, False), ((0.9, -0.7, 0.5, -0.3) * 4, True)])
def test_what_windows_do_not_show_is_chance(drops: tuple[float, ...], passed: bool) -> None:
    """Both are worse by more than is allowed; the second by windows that are now better and now worse."""
    better = tuple(1.0 + index / 100 for index in range(len(drops)))
    windows = {"baseline": better, "compensated": tuple(one + drop for one, drop in zip(better, drops, strict=True))}
    text = measured(served()).model_copy(update={"windows": {name: {"perplexity": of} for name, of in windows.items()}})
    bound = {"metric": "perplexity", "max_ratio": 1.05}
    (plain,) = judged(text, bounds=(Bound.model_validate(bound),))
    (tested,) = judged(text, bounds=(Bound.model_validate({**bound, "significance": 0.05}),))
    assert not plain.passed
    assert tested.passed == passed
    chance = bootstrap([after - before for before, after in zip(better, windows["compensated"], strict=True)])
    assert f"p {chance:.3g}): expected at most 1.05, at a significance of 0.05" in tested.said
    with pytest.raises(RequestError, match="no number of perplexity for each window"):
        judged(measured(served()), bounds=(Bound.model_validate({**bound, "significance": 0.05}),))


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ({"at_least": 6.0}, "5.00: expected at least 6"),
        ({"max_drop": 2.5}, "3.00 worse (common tokens 5.00, original 8.00): expected at most 2.5"),
        ({"at_least": 4.5, "variant": "quantized"}, "4.00: expected at least 4.5"),
    ],
)
def test_what_models_write_can_be_bounded(bound: dict[str, object], said: str) -> None:
    samples = GenerationReport(
        new_tokens=8, longest_common={"baseline": 8.0, "quantized": 4.0, "compensated": 5.0}, samples=()
    )
    named = Bound.model_validate({"metric": "longest_common", **bound})
    (gate,) = judge(validation(generation={}, bounds=(named,)), {"text": measured(served())}, generation=samples)
    assert (gate.passed, gate.said) == (False, said)


@pytest.mark.parametrize(
    ("bound", "problem"),
    [
        ({"metric": "perplexitty", "at_most": 1.0}, "perplexitty"),
        ({"metric": "kl"}, "exactly one of"),
        ({"metric": "kl", "at_most": 1.0, "max_drop": 1.0}, "exactly one of"),
        ({"metric": "kl", "at_least": 1.0}, "at_least: expected the other"),
        ({"metric": "top1_agreement", "at_most": 1.0}, "at_most: expected the other"),
        ({"metric": "kl", "max_ratio": 1.0}, "max_ratio: expected at_most"),
        ({"metric": "kl", "at_most": 1.0, "slack": 0.1}, "slack: expected no_worse_than"),
        ({"metric": "kl", "at_most": 1.0, "text": "code"}, "bounds.0.text"),
        ({"metric": "kl", "at_most": 1.0, "significance": 0.05}, "significance: expected max_ratio, max_drop or"),
        ({"metric": "kl", "max_drop": 1.0, "variant": "quantized", "significance": 0.05}, "of the compensated model"),
        ({"metric": "longest_common", "max_drop": 1.0, "significance": 0.05}, "expected a metric of text"),
        ({"metric": "longest_common", "at_least": 4.0}, "longest_common: expected generation"),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(manifest: Path, bound: dict[str, object], problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        job_of(manifest, f"spec.validation.bounds=[{json.dumps(bound)}]")
    assert problem in str(caught.value)
    assert "spec.validation" in str(caught.value)


def test_a_text_cannot_take_the_name_of_the_first(manifest: Path) -> None:
    with pytest.raises(ManifestError, match=r"texts.text: expected another name"):
        job_of(manifest, "spec.validation.texts={text: {source: {uri: validation.txt}}}")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with two texts."""
    path = write_job(tmp_path_factory.mktemp("job"), layers=2)
    write_text(path.parent / "other.txt", 5 * 32, seed=2)
    return path


TEXTS = "spec.validation.texts={other: {source: {uri: other.txt}, windows: 4}}"


def test_a_failed_bound_publishes_nothing_keeps_the_work_and_is_in_the_report(manifest: Path, tmp_path: Path) -> None:
    output = f"spec.output.uri={tmp_path}"
    bound = "spec.validation.bounds=[{metric: kl, text: other, variant: quantized, at_most: 0.0}]"
    with pytest.raises(GateError, match=r"^spec.validation.bounds.0.at_most: .* on 'other': expected at most 0\n"):
        run_local(job_of(manifest, output, TEXTS, bound))
    assert not list(tmp_path.glob("tiny/*/*"))
    (path,) = tmp_path.glob("_work/failed/*/report.json")
    report = Report.model_validate_json(path.read_bytes())
    (gate,) = report.gates
    assert not gate.passed
    assert gate.beyond == gate.measured == report.texts["other"].quantized.kl > 0
    assert gate.said in (path.parent / "report.html").read_text().replace("&#x27;", "'")
    events = Events()
    published = run_local(job_of(manifest, output, TEXTS), progress=events)
    assert {reused for _, reused in events.named("block_done")} <= {True}
    assert json.loads((local_path(published.uri) / "report" / "report.json").read_text())["gates"] == []


def test_an_artifact_may_not_be_worse_than_another_on_the_same_tokens(manifest: Path, tmp_path: Path) -> None:
    rival = run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'rival'}", TEXTS)).document
    bound = f"{{metric: kl, text: other, no_worse_than: '{tmp_path / 'rival' / 'tiny'}'"
    tokenizer = (manifest.parent / "model" / "tokenizer.json").read_bytes()
    rival_uri = (tmp_path / "rival" / "tiny").as_uri()
    worse = (f"spec.output.uri={tmp_path / 'worse'}", TEXTS, "spec.recipe.weights.bits=3")
    with pytest.raises(
        GateError, match=r"worse \(KL 0\.\d+, file:.*rival/tiny 0\.\d+\) on 'other': expected at most 0\n"
    ):
        run_local(job_of(manifest, *worse, f"spec.validation.bounds=[{bound}}}]"))
    tested = run_local(job_of(manifest, *worse, f"spec.validation.bounds=[{bound}, slack: 1.0, significance: 0.05}}]"))
    assert tested.document.id != rival.id
    (gate,) = read_report(tested.uri).gates
    assert gate.said.endswith("on 'other': expected at most 1, at a significance of 0.05")
    for change, problem in (
        ("spec.validation.texts={other: {source: {uri: other.txt}, windows: 3}}", "not about the tokens of 'other'"),
        ("spec.validation.compute_dtype=bfloat16", "measured in float32: expected bfloat16"),
    ):
        with pytest.raises(RequestError, match=rf"^spec.validation.bounds.0.no_worse_than: .*{problem}"):
            run_local(job_of(manifest, *worse, f"spec.validation.bounds=[{bound}}}]", change))
    sparse = Validation(text=SOURCE, bounds=(Bound(metric="router_agreement", no_worse_than=rival_uri),))
    with pytest.raises(RequestError, match="its report has no router_agreement"):
        read_rivals(sparse, read_tokens(job_of(manifest), tokenizer).validation)


def test_a_broken_base_model_is_not_blamed_on_compression(tmp_path: Path) -> None:
    """A model of random weights predicts nothing: the bound that fails says whose fault that is, and so does the report."""
    healthy = {"text": measured(served())}
    assert base_model_problem(healthy, 32_000) is None
    broken = {"text": measured(served(), original=Quality(perplexity=20_000.0, kl=0.0, top1_agreement=1.0))}
    problem = base_model_problem(broken, 32_000)
    assert problem is not None
    assert problem.startswith("the original itself, before any compression, has a perplexity of 20000.0 on 'text'")
    manifest = write_job(tmp_path / "job", layers=1)
    events = Events()
    with pytest.raises(GateError, match=r"(?m)^the original itself, before any compression, has a perplexity of"):
        run_local(job_of(manifest, "spec.validation.gates={kl: 1.0e-9}"), progress=events)
    assert any("the original itself" in line for (line,) in events.named("note"))
    (path,) = tmp_path.glob("job/out/_work/failed/*/report.json")
    report = Report.model_validate_json(path.read_bytes())
    assert report.base_model_problem is not None
    assert report.baseline is not None
    assert report.baseline.perplexity > VOCABULARY / 2
