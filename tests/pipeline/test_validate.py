from __future__ import annotations

from pathlib import Path

import pytest

from counterweight.pipeline.artifact.report import Quality, Report
from counterweight.pipeline.manifest import Gates, Validation
from counterweight.pipeline.validate import check_gates
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.errors import GateError
from counterweight.workers.metrics import METRICS
from counterweight.workers.tasks.evaluate import Evaluate
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.setting import shard_sequences
from tests.pipeline.tiny import Events, LocalPool, job_of, local_path, run_local, write_job

ORIGINAL = Quality(perplexity=10.0, kl=0.0, top1_agreement=1.0)
BAD = Quality(perplexity=1e9, kl=1e9, top1_agreement=0.0)


def judge(gates: Gates, baseline: Quality, compensated: Quality) -> None:
    check_gates(validation(gates=gates), {"baseline": baseline, "quantized": BAD, "compensated": compensated})


def validation(**gates: Gates) -> Validation:
    return Validation(text=TextSource(uri="file:///text.txt"), **gates)


def served(perplexity: float = 11.0, kl: float = 0.1) -> Quality:
    return Quality(perplexity=perplexity, kl=kl, top1_agreement=0.9)


@pytest.mark.parametrize(
    "gates",
    [Gates(), Gates(perplexity_ratio=1.1), Gates(kl=0.1), Gates(perplexity_ratio=1.5, kl=1.0)],
)
def test_a_model_within_its_bounds_passes(gates: Gates) -> None:
    judge(gates, ORIGINAL, served())


def test_a_gate_names_what_was_measured_and_what_was_allowed() -> None:
    with pytest.raises(GateError) as caught:
        judge(Gates(perplexity_ratio=1.05, kl=0.05), ORIGINAL, served())
    assert str(caught.value).splitlines() == [
        "spec.validation.gates.perplexity_ratio: 1.1000 (perplexity 11.0000, original 10.0000): expected at most 1.05",
        "spec.validation.gates.kl: 0.10000: expected at most 0.05",
    ]


def test_every_metric_has_its_gate() -> None:
    """Absolute or relative, at most or at least."""
    original = Quality.model_validate({**ORIGINAL.model_dump(), "kl_p99": 0.0})
    model = Quality.model_validate({**served().model_dump(), "kl_p99": 0.7})
    judge(Gates(kl_p99=0.7, top1_agreement=0.9), original, model)
    with pytest.raises(GateError) as caught:
        judge(Gates(kl_p99=0.6, top1_agreement=0.95), original, model)
    assert str(caught.value).splitlines() == [
        "spec.validation.gates.kl_p99: 0.70000: expected at most 0.6",
        "spec.validation.gates.top1_agreement: 0.9000: expected at least 0.95",
    ]
    assert {metric.gate for metric in METRICS} == set(Gates.model_fields)


def test_one_gate_alone_is_enough() -> None:
    with pytest.raises(GateError, match=r"^spec.validation.gates.kl: "):
        judge(Gates(perplexity_ratio=2.0, kl=0.05), ORIGINAL, served())


@pytest.mark.parametrize("gates", [Gates(perplexity_ratio=1e6), Gates(kl=1e6)])
def test_what_is_no_number_passes_no_gate(gates: Gates) -> None:
    nothing = Quality.model_construct(perplexity=float("nan"), kl=float("nan"), top1_agreement=0.0)
    with pytest.raises(GateError):
        judge(gates, ORIGINAL, nothing)


def test_gates_look_at_decoding_and_gates_for_prefill_at_prefill() -> None:
    """Without residual stores both are one model."""
    found = {"baseline": ORIGINAL, "quantized": BAD, "compensated": served(11.0)}
    with_store = {**found, "compensated_prefill": served(12.0)}
    strict, loose = Gates(perplexity_ratio=1.15), Gates(perplexity_ratio=1.25)
    check_gates(validation(gates=strict), with_store)
    check_gates(validation(gates=strict, prefill_gates=loose), with_store)
    check_gates(validation(gates=strict, prefill_gates=strict), found)
    with pytest.raises(GateError) as caught:
        check_gates(validation(prefill_gates=strict), with_store)
    assert str(caught.value) == (
        "spec.validation.prefill_gates.perplexity_ratio: 1.2000 (perplexity 12.0000, original 10.0000): expected at most 1.15"
    )
    with pytest.raises(GateError, match=r"^spec.validation.prefill_gates.kl: 0.10000: expected at most 0.05$"):
        check_gates(validation(prefill_gates=Gates(kl=0.05)), found)


def test_a_job_whose_model_fails_in_prefill_publishes_nothing(manifest: Path, tmp_path: Path) -> None:
    store = ("spec.recipe={weights: {bits: 3}, residual: {channels_per_chunk: 1024}}", f"spec.output.uri={tmp_path}")
    with pytest.raises(GateError, match=r"^spec.validation.prefill_gates.kl: "):
        run_local(job_of(manifest, *store, "spec.validation.prefill_gates={kl: 0.05}"))
    document = run_local(job_of(manifest, *store, "spec.validation.gates={kl: 0.05}")).document
    assert document.compensated is not None
    assert document.compensated_prefill is not None
    assert document.compensated.kl < 0.05 < document.compensated_prefill.kl


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


def report_of(uri: str) -> Report:
    return Report.model_validate_json((local_path(uri) / "report" / "report.json").read_bytes())


def test_the_windows_are_shared_out_without_gap_or_overlap_and_the_figures_do_not_notice(
    manifest: Path, tmp_path: Path
) -> None:
    """Seven windows in batches of four on one, two, three and nine workers: whole batches, equal bits."""
    assert shard_sequences(2048) == 4
    text = tmp_path / "long.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 4000)
    long = (
        f"spec.validation.text.uri={text}",
        "spec.validation.sequence_length=2048",
        "spec.validation.windows=7",
    )
    figures = []
    for workers in (1, 2, 3, 9):
        pool, events = LocalPool(workers), Events()
        published = run_local(job_of(manifest, f"spec.output.uri={tmp_path / str(workers)}", *long), pool, events)
        specs = [task.original for _, task in pool.calls if isinstance(task, Evaluate)]
        assert sorted(specs, key=lambda s: s.start) == sorted(
            (task for _, task in pool.calls if isinstance(task, Original)), key=lambda s: s.start
        )
        windows = [number for spec in sorted(specs, key=lambda s: s.start) for number in range(spec.start, spec.stop)]
        assert windows == list(range(7))
        assert len(specs) == min(workers, 2)
        assert events.named("windows") == [(done + 1, len(specs)) for done in range(len(specs))]
        report = report_of(published.uri)
        names = [task.name for task in report.tasks if task.name.startswith("validation")]
        assert len(names) == len(specs)
        assert names[0].startswith("validation of windows 0 to ")
        figures.append((report.baseline, report.quantized, report.compensated))
    assert figures[1:] == figures[:1] * 3


def test_without_a_validation_nothing_is_measured(manifest: Path, tmp_path: Path) -> None:
    pool = LocalPool(1)
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation="), pool)
    assert published.document.baseline is None
    assert published.document.compensated is None
    assert not any(isinstance(task, Evaluate) for _, task in pool.calls)


def test_what_is_claimed_without_compensation_is_measured_without_it(manifest: Path, tmp_path: Path) -> None:
    """The quantized figures of a compensated artifact are those of the artifact without compensation."""
    compensated = run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'with'}")).document
    plain = run_local(
        job_of(manifest, f"spec.output.uri={tmp_path / 'without'}", "spec.recipe.compensation={kind: none}")
    ).document
    assert compensated.quantized == plain.quantized == plain.compensated
    assert compensated.compensated != compensated.quantized
    assert compensated.baseline == plain.baseline
    assert plain.baseline is not None
    assert plain.baseline.kl == 0.0
    assert plain.baseline.top1_agreement == 1.0
