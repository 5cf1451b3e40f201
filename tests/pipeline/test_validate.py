from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.preflight import look
from counterweight.pipeline.shares import READ_TOKENS, original_shares, shares
from counterweight.pipeline.tokens import read_tokens
from counterweight.workers.errors import GateError
from counterweight.workers.tasks.evaluate import Evaluate
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.setting import shard_sequences
from tests.models import write_text
from tests.pipeline.tiny import Events, LocalPool, job_of, local_path, run_local, write_job

BEGINNING = 1


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
    """Seven windows, four to a batch, on one, two, three and nine workers: equal bits."""
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
        assert len(specs) == {1: 1, 2: 2, 3: 3, 9: 7}[workers], "a window of 2048 tokens runs alone on a CPU"
        assert events.named("windows") == [(done + 1, len(specs)) for done in range(len(specs))]
        report = report_of(published.uri)
        names = [task.name for task in report.tasks if task.name.startswith("validation")]
        assert len(names) == len(specs)
        assert names[0].startswith("validation of windows 0 to ")
        figures.append((report.baseline, report.quantized, report.compensated))
    assert figures[1:] == figures[:1] * 3


def test_originals_are_no_more_than_a_gpu_has_tokens_for() -> None:
    """Few windows are one task's, for all workers; on a CPU, and of many, each worker's are one's."""
    length = 2048
    batch, few, many = shard_sequences(length), 160, 8 * READ_TOKENS // length
    assert [len(each) for each in original_shares(few, length, 8, gpu=True)] == [8]
    assert [len(each) for each in original_shares(2 * READ_TOKENS // length, length, 8, gpu=True)] == [4, 4]
    assert [len(each) for each in original_shares(many, length, 8, gpu=True)] == [1] * 8
    assert [len(each) for each in original_shares(few, length, 8, gpu=False)] == [1] * 8
    for windows in (batch + 1, few, many):
        together = original_shares(windows, length, 8, gpu=True)
        assert [share for each in together for share in each] == shares(windows, length, 8, gpu=True)


def test_windows_that_run_together_stay_together(tmp_path: Path) -> None:
    """Of a sparse model, where the bits of an expert's few tokens depend on their number: ten windows, four at a time."""
    manifest = write_job(tmp_path / "job", layers=1, case="mixtral")
    text = write_text(tmp_path / "job" / "validation.txt", 10 * 256, seed=1)
    asked = (f"spec.validation.text.uri={text}", "spec.validation.sequence_length=256")
    figures = []
    for workers in (1, 2):
        pool = LocalPool(workers)
        found = report_of(run_local(job_of(manifest, f"spec.output.uri={tmp_path / str(workers)}", *asked), pool).uri)
        assert sum(isinstance(task, Evaluate) for _, task in pool.calls) == workers
        figures.append((found.judged, found.routers))
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("length", "gpu", "expected"),
    [
        (256, False, [80, 80]),  # pieces of 4 windows
        (256, True, [96, 64]),  # batches of 32
        (2048, False, [80, 80]),
        (350, False, [92, 68]),  # batches of 23 are not whole pieces of 2
    ],
)
def test_workers_have_about_as_many_windows_each(length: int, gpu: bool, expected: list[int]) -> None:
    assert [len(share) for share in shares(160, length, 2, gpu=gpu)] == expected


def test_windows_that_one_task_runs_through_the_original_are_judged_by_all_workers_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, of a sparse model: each finds its own windows, and where the original's routers send their tokens."""
    manifest = write_job(tmp_path / "job", layers=1, case="mixtral")
    text = write_text(tmp_path / "job" / "validation.txt", 5 * 2048, seed=1)
    asked = (
        f"spec.validation.text.uri={text}",
        "spec.validation.sequence_length=2048",
        "spec.recipe={weights: {bits: 2, group_size: 32}}",
    )
    figures = []
    for together in (False, True):
        with monkeypatch.context() as patch:
            if together:
                patch.setattr(
                    "counterweight.pipeline.validate.original_shares",
                    lambda *arguments, **_: original_shares(*arguments, gpu=True),
                )
            pool = LocalPool(2)
            report = report_of(
                run_local(job_of(manifest, f"spec.output.uri={tmp_path / str(together)}", *asked), pool).uri
            )
        tasks = [task for _, task in pool.calls]
        assert sum(isinstance(task, Original) for task in tasks) == (1 if together else 2)
        assert sum(isinstance(task, Evaluate) for task in tasks) == 2
        if together:
            kinds = [task.kind for task in tasks]
            assert kinds.index(Original.kind) < kinds.index("forward"), "the longest task is begun first"
        figures.append((report.judged, report.routers))
    assert figures[0] == figures[1]
    assert 0 < figures[0][1]["quantized"][0] < 1


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


def test_every_text_has_the_figures_of_a_job_of_its_own(manifest: Path, tmp_path: Path) -> None:
    """One run measures all, with every block read once; the report names what was measured on which."""
    write_text(manifest.parent / "other.txt", 5 * 32, seed=2)
    further = "spec.validation.texts={other: {source: {uri: other.txt}, windows: 4}}"
    pool = LocalPool(1)
    both = report_of(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'both'}", further), pool).uri)
    assert len([task for _, task in pool.calls if isinstance(task, Evaluate)]) == 1
    alone = ("spec.validation.text.uri=other.txt", "spec.validation.windows=4")
    one = report_of(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'one'}")).uri)
    other = report_of(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'other'}", *alone)).uri)
    assert list(both.judged) == ["text", "other"]
    for found, expected in ((both.judged["text"], one.judged["text"]), (both.judged["other"], other.judged["text"])):
        assert found.tokens == expected.tokens
        for variant, quality in expected.qualities.items():
            assert found.qualities[variant].model_dump() == pytest.approx(quality.model_dump(), rel=1e-5, abs=1e-6)
            assert found.kl_by_position[variant] == pytest.approx(expected.kl_by_position[variant], rel=1e-4, abs=1e-6)
    assert both.judged["other"].tokens.sequences == 4
    assert both.judged["other"].compensated != both.judged["text"].compensated


def test_windows_begin_with_the_tokenizers_beginning_where_the_manifest_says_so(tmp_path: Path) -> None:
    """And by themselves where a model's family is lost without one."""
    for family, option, all_begin in (
        ("llama", None, False),
        ("llama", "window", True),
        ("gemma3_text", None, True),
        ("gemma3_text", "text", False),
    ):
        root = tmp_path / f"{family}-{option}"
        path = write_job(root, layers=1, case=family)
        with_beginning(root / "model" / "tokenizer.json")
        job = job_of(path, *([] if option is None else [f"spec.validation.special_tokens={option}"]))
        tokens = read_tokens(job, None, texts=look(job).texts)
        windows = tokens.validation["text"]
        assert windows.ids[0, 0] == BEGINNING
        assert bool((windows.ids[:, 0] == BEGINNING).all()) == all_begin
        words = [int(word[1:]) for word in (root / "validation.txt").read_text().split()]
        inner = windows.ids[:, 1:].flatten() if all_begin else windows.ids.flatten()[1:]
        assert inner.tolist() == words[: len(inner)]
        assert windows.length == 32


def with_beginning(path: Path) -> None:
    """A tokenizer that puts BEGINNING before every text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(
        single=f"w{BEGINNING} $A", special_tokens=[(f"w{BEGINNING}", BEGINNING)]
    )
    tokenizer.save(str(path))
