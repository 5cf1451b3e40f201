"""What a run takes over of earlier ones, and what it says of the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import DOCUMENT, Published, verify
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.resume import Earlier, Finished, blocks_text, foreseen
from counterweight.workers import keys
from counterweight.workers.errors import RequestError
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.made_from import INPUTS
from counterweight.workers.tasks.task import Task
from tests.models import write_text
from tests.pipeline.tiny import Death, Events, LocalPool, files_of, job_of, local_path, run_local, write_job

REASONS = "not reused: "


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job all of whose three blocks are finished, without validation."""
    manifest = write_job(tmp_path_factory.mktemp("job"))
    run_local(job_of(manifest, "spec.validation="))
    return manifest.parent


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, in which an artifact is of no use: the job is looked at again."""
    target = tmp_path / "job"
    shutil.copytree(finished, target)
    shutil.rmtree(target / "out" / "tiny")
    return target


def again(folder: Path, *overrides: str, resume: Resume = Resume.AUTO) -> tuple[int, list[str]]:
    """How many blocks are reused, and why the others are not."""
    events = Events()
    run_local(job_of(folder / "job.yaml", "spec.validation=", *overrides), progress=events, resume=resume)
    ((_, reused),) = events.named("plan")
    notes = [text for (text,) in events.named("note")]
    return reused, [text.removeprefix(REASONS) for text in notes if text.startswith(REASONS)]


def changed_weight(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_the_same_is_reused_without_a_word(folder: Path) -> None:
    assert again(folder) == (3, [])


def test_a_first_run_gives_no_reasons(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    assert again(folder) == (0, [])


def test_blocks_that_were_not_finished_are_named_as_that(folder: Path) -> None:
    shutil.rmtree(folder / "out")

    def fault(worker: int, task: Task[Any]) -> Exception | None:
        return RequestError("stopped") if isinstance(task, Compress) and task.block.index == 1 else None

    with pytest.raises(RequestError, match="stopped"):
        run_local(job_of(folder / "job.yaml", "spec.validation="), LocalPool(1, fault=fault))
    assert again(folder) == (1, ["blocks 1 to 2: not finished before"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["spec.recipe.weights.bits=3"], "recipe.weights: not the same"),
        (["spec.recipe.compensation.rank.count=2"], "recipe.compensation: not the same"),
        (["spec.calibration.compute_dtype=bfloat16"], "calibration.compute_dtype: float32 before, bfloat16 now"),
        (["spec.calibration.propagate=compressed"], "calibration.propagate: original before, compressed now"),
        (["spec.calibration.sequences=8"], "calibration tokens: not the same"),
        (["spec.recipe.transforms=[{kind: rotation}]"], "rotation: not the same"),
    ],
)
def test_what_a_manifest_changes_is_said_in_one_line_for_all_blocks(
    folder: Path, overrides: Sequence[str], expected: str
) -> None:
    assert again(folder, *overrides) == (0, [f"blocks 0 to 2: {expected}"])


def test_another_text_is_said(folder: Path) -> None:
    write_text(folder / "calibration.txt", 500, seed=7)
    assert again(folder) == (0, ["blocks 0 to 2: calibration tokens: not the same"])


def test_a_method_that_computes_otherwise_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTQ, "VERSION", 99)
    reused, (reason,) = again(folder)
    assert reused == 0
    assert reason.startswith("blocks 0 to 2: version of GPTQ: ")
    assert reason.endswith(" before, 99 now")


def test_numerics_that_differ_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.NUMERICS
    monkeypatch.setattr(keys, "NUMERICS", 99)
    assert again(folder) == (0, [f"blocks 0 to 2: numerics: {before} before, 99 now"])


def test_weights_that_differ_are_said_of_their_block_and_hidden_states_of_those_behind(folder: Path) -> None:
    changed_weight(folder, "model.layers.1.mlp.up_proj.weight")
    reused, reasons = again(folder)
    assert reused == 1
    # What leaves block 1 is not known before it has run.
    waits = f"block 2: finished before as far as is known now: the {INPUTS} are not yet"
    assert reasons == ["block 1: weights: not the same", waits]


def test_the_nearest_of_several_earlier_jobs_is_compared(folder: Path) -> None:
    again(folder, "spec.recipe.weights.bits=3", "spec.calibration.compute_dtype=bfloat16")
    # Bits and dtype differ from the first job, the dtype alone from the second.
    assert again(folder, "spec.recipe.weights.bits=3") == (
        0,
        ["blocks 0 to 2: calibration.compute_dtype: bfloat16 before, float32 now"],
    )


def records(folder: Path) -> list[Path]:
    return sorted((folder / "out" / "_work" / "commits" / "block").iterdir())


def test_records_of_the_last_revision_are_reused_and_explain_nothing(folder: Path) -> None:
    for path in records(folder):
        record = json.loads(path.read_text())
        assert record.pop("made_from")
        path.write_text(json.dumps(record))
    assert again(folder) == (3, [])
    shutil.rmtree(folder / "out" / "tiny")
    assert again(folder, "spec.recipe.weights.bits=3") == (
        0,
        ["blocks 0 to 2: finished before, by a version that did not keep what a block is made from"],
    )


def test_a_block_whose_bytes_are_gone_is_said(folder: Path) -> None:
    record = next(found for found in map(json.loads, map(Path.read_text, records(folder))) if found["index"] == 0)
    (folder / "out" / "_work" / "blobs" / record["checkpoint"]["sha256"]).unlink()
    assert again(folder) == (2, ["block 0: finished before, and what was stored of it is gone"])


def test_a_damaged_record_of_another_job_keeps_nobody_from_working(folder: Path) -> None:
    for path in records(folder):
        path.write_text("{")
    assert again(folder, "spec.recipe.weights.bits=3") == (0, [])


def test_a_budget_that_is_not_shared_out_yet_is_not_compared(folder: Path) -> None:
    """Ranks of a budget are known when all gains are."""
    budget = ["spec.recipe.compensation={kind: svd, rank: {budget_bits: 2.0}}"]
    again(folder, *budget)
    shutil.rmtree(folder / "out" / "tiny")
    for kind in ("gains", "forward"):
        shutil.rmtree(folder / "out" / "_work" / "commits" / kind)
    reused, reasons = again(folder, *budget)
    assert reused == 0
    assert [reason.partition(": ")[2].partition(" as")[0] for reason in reasons] == ["finished before"]


# -- required and never ---------------------------------------------------------------------------------------------


def test_required_goes_on_with_what_is_there(folder: Path) -> None:
    assert again(folder, resume=Resume.REQUIRED) == (3, [])


def test_required_refuses_with_the_reason_before_any_block_is_touched(folder: Path) -> None:
    pool = LocalPool()
    with pytest.raises(RequestError, match=r"^--resume required: none of 3 blocks can be reused: (.*)$") as caught:
        run_local(job_of(folder / "job.yaml", "spec.recipe.weights.bits=3"), pool, resume=Resume.REQUIRED)
    assert str(caught.value).endswith(": blocks 0 to 2: recipe.weights: not the same")
    assert {task.kind for _, task in pool.calls} == {"inspect"}


def test_required_refuses_an_output_without_any_block(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    with pytest.raises(RequestError, match="none of 3 blocks can be reused: no block was ever finished in this output"):
        again(folder, resume=Resume.REQUIRED)


def test_required_is_content_with_a_published_artifact(folder: Path) -> None:
    job = job_of(folder / "job.yaml", "spec.validation=")
    run_local(job)
    assert run_local(job, resume=Resume.REQUIRED).existing


def test_never_takes_nothing_over_and_ends_in_the_same_bytes(folder: Path) -> None:
    job = job_of(folder / "job.yaml", "spec.validation=")
    for path in (folder / "out" / "_work").rglob("*"):
        if path.is_file():  # whatever is read of it is found out
            path.write_bytes(b"\0" * path.stat().st_size)
    pool = LocalPool(2)
    published = run_local(job, pool, resume=Resume.NEVER)
    assert sum(isinstance(task, Compress) for _, task in pool.calls) == 3
    found = files_of(local_path(published.uri))
    honest = run_local(job_of(folder / "job.yaml", "spec.validation=", f"spec.output.uri={folder / 'other'}"))
    assert found == files_of(local_path(honest.uri))
    assert published.document.id == honest.document.id


def test_a_run_that_shares_nothing_does_all_beside_one_that_publishes_the_same(folder: Path) -> None:
    job = job_of(folder / "job.yaml", "spec.validation=")
    other: list[Published] = []

    def beside(worker: int, task: Task[Any]) -> None:
        if isinstance(task, Compress) and not other:
            other.append(run_local(job))

    pool = LocalPool(1, fault=beside)
    published = run_local(job, pool, resume=Resume.NEVER)
    assert sum(isinstance(task, Compress) for _, task in pool.calls) == 3
    assert published.document == other[0].document == verify(published.uri)
    assert len(list((folder / "out").rglob(DOCUMENT))) == 1


def test_nobody_finds_the_work_of_a_run_that_shares_none(folder: Path) -> None:
    shutil.rmtree(folder / "out")

    def fault(worker: int, task: Task[Any]) -> Exception | None:
        return RequestError("stopped") if task.kind == "keep" else None

    job = job_of(folder / "job.yaml", "spec.validation=")
    with pytest.raises(RequestError, match="stopped"):
        run_local(job, LocalPool(1, fault=fault), resume=Resume.NEVER)
    assert len(records(folder)) == 3
    assert again(folder) == (0, [])


def test_never_is_refused_where_the_artifact_is_published(folder: Path) -> None:
    job = job_of(folder / "job.yaml", "spec.validation=")
    published = run_local(job)
    before = files_of(local_path(published.uri))
    with pytest.raises(RequestError, match=f"^--resume never: {published.uri} is published already, "):
        run_local(job, resume=Resume.NEVER)
    assert files_of(local_path(published.uri)) == before


def test_a_worker_that_dies_in_a_run_that_shares_none_costs_its_task(folder: Path) -> None:
    doomed = {"block", "forward"}

    def fault(worker: int, task: Task[Any]) -> Death | None:
        if task.kind not in doomed:
            return None
        doomed.remove(task.kind)
        return Death.AFTER

    pool = LocalPool(2, fault=fault)
    published = run_local(job_of(folder / "job.yaml", "spec.validation="), pool, resume=Resume.NEVER)
    assert len(pool.restarts) == 2
    assert len(list((folder / "out").rglob(DOCUMENT))) == 1
    assert published.document.id


# -- what a plan says -----------------------------------------------------------------------------------------------


def planned(folder: Path, *overrides: str) -> list[str]:
    job, source = job_of(folder / "job.yaml", *overrides), open_model((folder / "model").as_uri())
    return foreseen(job, source, make_plan(job, source))


def test_a_plan_says_what_could_be_reused_and_what_not(folder: Path) -> None:
    could = "blocks 0 to 2: finished before, and reused where weights and calibration tokens are the same"
    assert planned(folder) == [could]
    assert planned(folder, "spec.recipe.weights.bits=3") == ["blocks 0 to 2: recipe.weights: not the same"]
    assert planned(folder, "spec.resources.gpus_per_worker=1") == ["blocks 0 to 2: device: cpu before, cuda now"]


def test_a_plan_of_an_empty_output_says_so(folder: Path, tmp_path: Path) -> None:
    assert planned(folder, f"spec.output.uri={tmp_path / 'nowhere'}") == ["nothing: no block was finished before"]
    assert not (tmp_path / "nowhere").exists()


def test_a_plan_does_not_wait_for_storage_that_is_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    (line,) = planned(folder, "spec.output.uri=s3://bucket/prefix")
    assert line.startswith("not known: ")


# -- without a job --------------------------------------------------------------------------------------------------


def test_differences_that_not_all_blocks_have_are_told_apart() -> None:
    earlier = Earlier([Finished(index=index, made_from={"a": "1", "b": "1"}) for index in range(4)])
    wanted = {0: {"a": "2", "b": "1"}, 1: {"a": "2", "b": "2"}, 3: {"a": "2", "b": "1"}, 4: {"a": "1", "b": "1"}}
    assert earlier.reasons(wanted) == [
        "blocks 0 to 1, 3: a: 1 before, 2 now",
        "block 1: b: 1 before, 2 now",
        "block 4: not finished before",
    ]


def test_only_the_newest_records_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterweight.pipeline.resume.RECORDS_PER_BLOCK", 1)
    found = Earlier.of(open_store((folder / "out").as_uri()), 2)
    assert len(found.finished) == 2


def test_blocks_are_named_in_spans() -> None:
    assert blocks_text([3]) == "block 3"
    assert blocks_text([0, 1, 2, 4, 7, 8]) == "blocks 0 to 2, 4, 7 to 8"
