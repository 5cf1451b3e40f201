"""Hidden states in a worker's memory: at every grain the same bytes, and what a death loses is made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.hidden_states import HiddenStatesPlan
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.passing import CommonMemory, Given, References
from counterweight.pipeline.plan import make_plan
from counterweight.workers.errors import IntegrityError, RequestError
from counterweight.workers.passing import NAME, OwnMemory, pass_on, receive
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.task import Task
from counterweight.workers.tensor_blobs import blob_of
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Workspace
from tests.pipeline.passing_tasks import Receive
from tests.pipeline.tiny import Death, Events, Fault, LocalPool, files_of, job_of, local_path, run_local, write_job

LAYERS = 4
LAST = LAYERS - 1
SPILLS = "spec.resources.hidden_states.memory=0.1MiB"
"""Room for one of the two larger shards that enter and leave a block, of 96 KiB."""
NO_MEMORY = "spec.resources.hidden_states.memory=0MiB"


def grain(every: int) -> str:
    return f"spec.resources.hidden_states.durable_every={every}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=LAYERS).parent


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of a job whose hidden states go through the store."""
    return made(folder, tmp_path_factory.mktemp("undisturbed"), NO_MEMORY)


def made(folder: Path, output: Path, *overrides: str, pool: LocalPool | None = None) -> dict[str, bytes]:
    """The files of a job's artifact, in an output of its own."""
    job = job_of(folder / "job.yaml", "spec.validation=", f"spec.output.uri={output}", *overrides)
    return files_of(local_path(run_local(job, pool).uri))


def stopped(folder: Path, output: Path, *overrides: str, workers: int = 1) -> LocalPool:
    """The pool of a job that ends when its last block is calibrated."""
    pool = LocalPool(workers, fault=at(LAST, RequestError("stopped")))
    with pytest.raises(RequestError, match="stopped"):
        made(folder, output, *overrides, pool=pool)
    return pool


def at(block: int, what: BaseException | Death) -> Fault:
    """What goes wrong once, with a block's compression."""
    left = [what]

    def fault(worker: int, task: Task[Any]) -> BaseException | Death | None:
        return left.pop() if left and isinstance(task, Compress) and task.block.index == block else None

    return fault


def calibrated(pool: LocalPool) -> list[int]:
    """Blocks in the order in which the original was run over them."""
    return [task.block.index for _, task in pool.calls if isinstance(task, Calibrate)]


def written(pool: LocalPool, output: Path) -> list[int]:
    """Blocks behind which all hidden states are in the store; -1 for the embedding. The last block's nobody has read."""
    inputs = {task.block.index: task.block.inputs for _, task in pool.calls if isinstance(task, Calibrate)}
    return [index - 1 for index, blobs in inputs.items() if all((output / blob.key).exists() for blob in blobs)]


RECIPES = {
    "original": (),
    "compressed": (
        "spec.calibration.propagate=compressed",
        "spec.recipe.activations={bits: 8}",
        "spec.recipe.compensation={kind: aser, rank: {count: 4}}",
    ),
}
"""In `compressed` ASER's branches look at what enters a block in the original, too."""


@pytest.fixture(scope="module", params=RECIPES)
def through_the_store(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, bytes]]:
    """A recipe's name, and its artifact."""
    return request.param, made(folder, tmp_path_factory.mktemp("store"), *RECIPES[request.param], NO_MEMORY)


@pytest.mark.parametrize("overrides", [(grain(0),), (grain(3), SPILLS)])
def test_no_grain_changes_a_byte(
    folder: Path, tmp_path: Path, overrides: Sequence[str], through_the_store: tuple[str, dict[str, bytes]]
) -> None:
    recipe, expected = through_the_store
    assert made(folder, tmp_path, *RECIPES[recipe], *overrides) == expected


def test_without_memory_every_boundary_is_written(folder: Path, tmp_path: Path) -> None:
    assert written(stopped(folder, tmp_path, grain(0), NO_MEMORY), tmp_path) == [-1, 0, 1, 2]


@pytest.mark.parametrize(("every", "again"), [(2, [2]), (0, [0, 1, 2])])
def test_what_a_dead_worker_held_is_made_again_from_the_last_boundary_that_was_written(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], every: int, again: list[int]
) -> None:
    """At once: the task that the death has cost a try is the only one that is tried twice."""
    pool, events = LocalPool(fault=at(LAST, Death.BEFORE)), Events()
    job = job_of(folder / "job.yaml", "spec.validation=", f"spec.output.uri={tmp_path}", grain(every))
    published = run_local(job, pool, events)
    assert files_of(local_path(published.uri)) == undisturbed
    assert calibrated(pool) == [0, 1, 2, 3, *again]
    assert pool.restarts == [0]
    assert len([text for (text,) in events.named("note") if "tried again" in text or "try " in text]) <= 1
    reruns = [task for _, task in pool.calls if isinstance(task, Calibrate)][LAYERS:]
    assert all(task.passing for task in reruns), "of blocks that are compressed only the outputs are wanted"


@pytest.mark.parametrize(
    ("every", "behind", "again"), [(1, [-1, 0, 1, 2], [3]), (2, [-1, 1], [2, 3]), (0, [-1], [0, 1, 2, 3])]
)
def test_a_job_that_was_killed_goes_on_from_the_last_boundary_that_was_written(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], every: int, behind: list[int], again: list[int]
) -> None:
    """Records name hidden states that are in nobody's memory any more; the last block's statistics are gone too."""
    assert written(stopped(folder, tmp_path, grain(every)), tmp_path) == behind
    pool = LocalPool()
    assert made(folder, tmp_path, grain(every), pool=pool) == undisturbed
    assert calibrated(pool) == again
    assert [task.block.index for _, task in pool.calls if isinstance(task, Compress)] == [LAST]


@pytest.mark.parametrize(("workers", "overrides"), [(2, (grain(0),)), (3, (grain(3), SPILLS))])
def test_several_workers_pass_them_on_in_memory_to_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    workers: int,
    overrides: Sequence[str],
    through_the_store: tuple[str, dict[str, bytes]],
) -> None:
    recipe, expected = through_the_store
    pool = LocalPool(workers)
    own = (*RECIPES[recipe], *overrides, f"spec.resources.workers={workers}")
    assert made(folder, tmp_path, *own, pool=pool) == expected
    blocks = {worker: task.block.index for worker, task in pool.calls if isinstance(task, Compress)}
    assert len(blocks) > 1 or recipe == "compressed", "all blocks were one worker's"
    assert not pool._references._kept, "nobody reads any of them"


def test_several_workers_write_the_boundaries_that_one_writes(folder: Path, tmp_path: Path) -> None:
    two = "spec.resources.workers=2"
    assert written(stopped(folder, tmp_path, grain(2), two, workers=2), tmp_path) == [-1, 1]
    pool = LocalPool(2)
    assert made(folder, tmp_path, grain(2), two, pool=pool) == made(folder, tmp_path / "other", grain(2))
    assert sorted(set(calibrated(pool))) == [2, 3], "from the last boundary that was written"


@pytest.mark.parametrize("block", [1, LAST])
def test_what_one_of_several_workers_held_is_made_again_when_it_dies(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], block: int
) -> None:
    """By the others and the one that takes its place. What others held is not made again where nobody lacks it."""
    pool = LocalPool(2, fault=at(block, Death.BEFORE))
    overrides = (grain(0), "spec.resources.workers=2")
    assert made(folder, tmp_path, *overrides, pool=pool) == undisturbed
    assert len(pool.restarts) == 1
    assert [task.block.index for _, task in pool.calls if isinstance(task, Compress)].count(block) == 2


def test_common_memory_keeps_what_it_has_room_for_and_what_it_does_not_is_written(tmp_path: Path) -> None:
    shards = [torch.full((1, 2, 4), float(value)) for value in range(3)]
    full: list[bool] = []
    memory: CommonMemory[torch.Tensor] = CommonMemory(
        lambda hidden: None if full else hidden.clone(), lambda kept: kept
    )
    blobs = [blob_of({NAME: shard}) for shard in shards]
    room = 2 * shards[0].nbytes
    memory.begin(Given(taken=shards[0].nbytes))
    assert [memory.keep(blob, shard, room) for blob, shard in zip(blobs, shards, strict=True)] == [True, False, False]
    assert memory.keep(blobs[0], shards[0], room), "it is there already"
    found = memory.find(blobs[0])
    assert found is not None
    assert torch.equal(found, shards[0])
    references: References[torch.Tensor] = References()
    references.add(0, memory.end())
    assert memory.find(blobs[0]) is None, "it is the driver's"
    full.append(True)
    assert not memory.keep(blobs[1], shards[1], room), "the object store has no room"
    full.clear()
    assert memory.keep(blobs[1], shards[1], 1 * shards[0].nbytes), "what found no room takes none"
    references.add(1, memory.end())

    reader = Receive(tmp_path.as_uri(), blobs)
    assert references.given(0, reader).taken == references.given(1, reader).taken == shards[0].nbytes
    assert references.given(2, reader).taken == 0
    memory.begin(references.given(2, reader))
    assert [memory.find(blob) is not None for blob in blobs] == [True, True, False]
    references.lost(0)
    references.forget(blobs[2:])
    assert set(references.given(2, reader).shards) == {blobs[1].sha256}
    references.forget(blobs)
    assert references.given(1, reader) == Given()


def test_another_job_is_not_deceived_by_records_of_hidden_states_that_were_in_memory(
    folder: Path, tmp_path: Path
) -> None:
    stopped(folder, tmp_path / "shared", grain(0))
    other = "spec.recipe.weights.bits=3"
    assert made(folder, tmp_path / "shared", other) == made(folder, tmp_path / "own", other)


def test_memory_stays_within_its_room_and_is_free_at_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: Counter[int] = Counter()
    keep = OwnMemory.keep

    def watched(self: OwnMemory, blob: Any, hidden: Any, room: int) -> bool:
        kept = keep(self, blob, hidden, room)
        peaks[room] = max(peaks[room], self.bytes)
        return kept

    monkeypatch.setattr(OwnMemory, "keep", watched)
    pool = LocalPool()
    job = job_of(folder / "job.yaml", f"spec.output.uri={tmp_path}")
    plan = make_plan(job, open_model(job.spec.model.uri)).hidden_states
    run_local(job, pool)
    assert peaks == {2 * plan.boundary_bytes: 2 * plan.boundary_bytes}
    mailbox = pool._slots[0].member.worker.context.mailbox
    assert isinstance(mailbox, OwnMemory)
    assert mailbox.bytes == 0


def test_what_memory_has_no_room_for_is_written(tmp_path: Path) -> None:
    worker, workspace = Worker(), Workspace(open_store(tmp_path.as_uri()))
    shards = [torch.full((1, 2, 4), float(value)) for value in range(3)]
    room = 2 * shards[0].nbytes
    blobs = [pass_on(worker.context, workspace, shard, room=room, lasting=False) for shard in shards]
    assert [workspace.has(blob) for blob in blobs] == [False, False, True]
    assert [receive(worker.context, workspace, blob).tolist() for blob in blobs] == [shard.tolist() for shard in shards]
    assert blobs == [blob_of({NAME: shard}) for shard in shards]
    worker.context.mailbox.forget(blobs[:1])
    again = pass_on(worker.context, workspace, shards[0] + 7, room=room, lasting=False)
    assert not workspace.has(again)
    worker.close()


def test_hidden_states_that_were_changed_in_memory_are_not_read() -> None:
    memory, hidden = OwnMemory(), torch.zeros(1, 2, 4)
    blob = blob_of({NAME: hidden})
    assert memory.keep(blob, hidden, hidden.nbytes)
    assert memory.keep(blob, hidden, hidden.nbytes), "it is there already"
    hidden[0, 0] = 1.0
    with pytest.raises(IntegrityError, match="were changed in memory"):
        memory.find(blob)


def planned(folder: Path, *overrides: str) -> HiddenStatesPlan:
    job = job_of(folder / "job.yaml", *overrides)
    return make_plan(job, open_model(job.spec.model.uri)).hidden_states


def test_the_plan_counts_bytes_and_what_a_death_costs(folder: Path) -> None:
    boundary = (12 + 1) * 32 * 64 * 4  # of all windows, one held out, in float32

    def counted(*overrides: str) -> tuple[int, int, int, int]:
        plan = planned(folder, *overrides)
        assert plan.boundary_bytes == boundary
        return plan.memory_bytes, plan.read_bytes, plan.written_bytes, plan.lost_blocks

    assert counted() == (2 * boundary, 0, boundary, 3), "all blocks are run again within a minute"
    assert counted(grain(1)) == (2 * boundary, 0, 5 * boundary, 0)
    assert counted(grain(2)) == (2 * boundary, 0, 3 * boundary, 1)
    assert counted(grain(0)) == (2 * boundary, 0, boundary, 3)
    assert counted(grain(0), NO_MEMORY) == (0, 4 * boundary, 5 * boundary, 0)
    assert counted("spec.resources.workers=2") == (2 * boundary, 0, 5 * boundary, 0), "of each"
    memory, read, wrote, _ = counted(grain(0), SPILLS)
    assert memory == int(0.1 * 2**20)
    assert read == pytest.approx(4 * (boundary - memory / 2), abs=1)
    assert wrote == pytest.approx(5 * boundary - 4 * memory / 2, abs=1)


def test_memory_for_hidden_states_is_not_there_for_tasks(folder: Path) -> None:
    def plan(*overrides: str) -> Any:
        job = job_of(folder / "job.yaml", "spec.resources.memory_per_worker=700MiB", *overrides)
        return make_plan(job, open_model(job.spec.model.uri))

    without, beside = plan(NO_MEMORY), plan("spec.resources.hidden_states.memory=64MiB")
    assert beside.peak_bytes_per_worker - without.peak_bytes_per_worker == beside.hidden_states.memory_bytes > 0
    tight = plan(f"spec.resources.memory_per_worker={without.peak_bytes_per_worker / 2**20 + 0.05:.3f}MiB")
    assert 0 < tight.hidden_states.memory_bytes <= 0.026 * 2**20, "half of what is free"
    assert not tight.problems


@pytest.mark.parametrize(("seconds", "every"), [(70.0, 1), (25.0, 2), (1.0, 0)])
def test_cpus_write_what_a_death_may_not_cost(seconds: float, every: int) -> None:
    planned = HiddenStatesPlan(boundary_bytes=1, memory_bytes=2, durable_every=1, blocks=4)
    found = planned.sparing(lambda lost: seconds * (lost + 1))
    assert found.durable_every == every
    assert seconds * (found.lost_blocks + 1) <= 60.0 or every == 1
    assert [block for block in range(4) if found.lasting(block)] == {1: [0, 1, 2, 3], 2: [1, 3], 0: []}[every]
