"""Memory that a manifest or a device gives a worker: blocks are divided for it, to the same artifact, or refused in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterweight.pipeline import devices
from counterweight.pipeline.events import EventLog
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.memory import PROCESS_BYTES
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.opening import open_job
from counterweight.pipeline.plan import make_plan
from counterweight.workers.errors import ManifestError, RequestError
from counterweight.workers.models.family import is_expert
from counterweight.workers.tasks.compress import Compress
from tests.models import CASES, Case
from tests.pipeline.tiny import Events, LocalPool, files_of, job_of, local_path, run_local, write_job

SPARSE = Case("mixtral", {**CASES["mixtral"].config, "num_local_experts": 8, "intermediate_size": 256})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), case=SPARSE, layers=2)


@pytest.fixture(scope="module")
def source(manifest: Path) -> ModelSource:
    return open_model((manifest.parent / "model").as_uri())


def given(manifest: Path, count: int, *overrides: str) -> CompressionJob:
    """The job with `count` bytes for the tasks of a worker, to a KiB."""
    memory = f"{(PROCESS_BYTES + count) / 2**20:.3f}MiB"
    return job_of(manifest, f"spec.resources.memory_per_worker={memory}", *overrides)


def test_a_block_that_needs_more_is_divided_into_as_few_passes_as_fit(manifest: Path, source: ModelSource) -> None:
    whole = make_plan(job_of(manifest), source).blocks[0]
    assert whole.passes == ()
    counts = []
    for share in (1.1, 0.8, 0.4):
        budget = int(whole.peak_bytes * share)
        plan = make_plan(given(manifest, budget), source)
        assert plan.problems == ()
        block = plan.blocks[0]
        assert block.peak_bytes <= budget
        assert block.undivided_bytes == whole.peak_bytes
        counts.append(len(block.passes))
        if block.passes:
            assert sorted(name for own in block.passes for name in own) == sorted(block.recipe)
    assert counts[0] == 0
    assert 1 < counts[1] < counts[2]


def test_an_expert_is_not_divided(manifest: Path, source: ModelSource) -> None:
    plan = make_plan(given(manifest, 1), source)
    experts = [{name.rpartition(".")[0] for name in own if is_expert(name)} for own in plan.blocks[0].passes]
    assert sum(len(own) for own in experts) == len(set().union(*experts)) == 8


def test_the_plan_says_what_is_divided_and_why(manifest: Path, source: ModelSource) -> None:
    whole = make_plan(job_of(manifest), source)
    assert whole.divided == ()
    (line,) = make_plan(given(manifest, int(0.8 * whole.blocks[0].peak_bytes)), source).divided
    assert line.startswith("block 0 to 1: ")
    assert " passes over the tokens, because it needs " in line
    assert "spec.resources.memory_per_worker is 61" in line


def test_further_passes_are_computed_again_and_counted(manifest: Path, source: ModelSource) -> None:
    whole = make_plan(job_of(manifest), source).blocks[0]
    divided = make_plan(given(manifest, int(0.65 * whole.peak_bytes)), source).blocks[0]
    again = len(divided.passes) - 1
    # Attention in every pass, and no expert more than once more.
    assert whole.forward_flops < divided.forward_flops < (1 + again) * whole.forward_flops
    assert divided.solve_flops == whole.solve_flops
    assert divided.statistics_flops == whole.statistics_flops


def test_what_no_division_makes_fit_is_refused_before_anything_runs(manifest: Path, source: ModelSource) -> None:
    job = given(manifest, 1 << 18)
    plan = make_plan(job, source)
    finest = len(plan.blocks[0].passes)
    assert finest == 10, "queries, keys and values; the attention's output; eight experts"
    (problem,) = plan.problems
    assert problem.startswith(f"block 0 in {finest} passes over the tokens needs ")
    assert problem.endswith(": spec.resources.memory_per_worker is 600 MiB")
    pool = LocalPool()
    with EventLog(Events()) as log, pytest.raises(RequestError, match=rf"^spec\.resources: block 0 in {finest} passes"):
        open_job(job, pool, log, here=False)
    pool.close()
    assert not any(isinstance(task, Compress) for _, task in pool.calls)


@pytest.mark.parametrize("share", [1, 0.5])
def test_a_job_is_divided_for_the_gpus_that_its_workers_have(manifest: Path, source: ModelSource, share: float) -> None:
    job = job_of(manifest, f"spec.resources.gpus_per_worker={share}")
    whole = make_plan(job, source)
    assert not whole.divided, "nothing is known of a GPU that nobody names"
    memory = int(0.7 * whole.blocks[0].peak_bytes / devices.USABLE / share)
    pool = LocalPool()
    with EventLog(Events()) as log:
        plan = open_job(job, pool, log, here=False, gpu_bytes=lambda: memory).plan
    pool.close()
    assert plan.blocks[0].peak_bytes <= 0.7 * whole.blocks[0].peak_bytes
    (line,) = plan.divided
    assert line.endswith(" of its GPU")


@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_memory_changes_no_byte_of_the_artifact(manifest: Path, tmp_path: Path, propagate: str) -> None:
    overrides = (f"spec.calibration.propagate={propagate}", "spec.recipe.weights.quantizer={kind: gptq}")
    source = open_model((manifest.parent / "model").as_uri())
    need = make_plan(job_of(manifest, *overrides), source).blocks[0].peak_bytes
    whole = job_of(manifest, *overrides, f"spec.output.uri={tmp_path / 'whole'}")
    divided = given(manifest, int(0.75 * need), *overrides, f"spec.output.uri={tmp_path / 'divided'}")
    assert make_plan(divided, source).problems == ()
    pool = LocalPool(2)
    found = [run_local(whole), run_local(divided, pool)]
    tasks = [task for _, task in pool.calls if isinstance(task, Compress)]
    assert all(len(task.block.passes) > 1 for task in tasks)
    assert found[0].uri.rpartition("/")[2] == found[1].uri.rpartition("/")[2]
    one, other = (files_of(local_path(each.uri)) for each in found)
    assert one == other


@pytest.mark.parametrize("memory", ["20", "20GB", "1e3GiB", "GiB", "-1GiB"])
def test_memory_is_a_number_and_a_unit(manifest: Path, memory: str) -> None:
    with pytest.raises(ManifestError, match=r"spec\.resources\.memory_per_worker: .*a number of MiB or GiB"):
        job_of(manifest, f"spec.resources.memory_per_worker='{memory}'")


def test_of_a_device_and_the_manifests_word_the_smaller_counts(
    manifest: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "MEMORY", {"tiny": 1 << 18})
    gpus = "spec.resources.gpus_per_worker=1"
    (problem,) = make_plan(job_of(manifest, gpus, "spec.resources.memory_per_worker=1GiB"), source, "tiny").problems
    assert problem.endswith(" of a GPU: a worker has 241 KiB of tiny")
    (problem,) = make_plan(job_of(manifest, gpus, "spec.resources.memory_per_worker=0.1MiB"), source, "tiny").problems
    assert problem.endswith(" of a GPU: spec.resources.memory_per_worker is 102 KiB")
