"""Jobs whose blocks several workers share: who did what leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import REPORT, REPORT_PAGE, Published
from counterweight.pipeline.pool import Outcome
from counterweight.workers.errors import WorkerError
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.files import Checksum
from counterweight.workers.tasks.propagate import Propagate
from counterweight.workers.tasks.solve import Solve, SolvedRecord
from counterweight.workers.tasks.task import Task
from counterweight.workers.worker import Worker
from tests.common_memory import Member
from tests.inprocess import InProcessPool, run_job
from tests.models import checkpoint
from tests.pipeline.unlike_recipes import RECIPES

CALIBRATION = {"sequences": 12, "sequence_length": 32, "propagate": "compressed", "held_out": 2}
"""Two shards: one that is solved on, and one that is held out."""

DRAWN = {"drawn": 2}
"""A third, for experts."""


GPTQ = {"weights": {"bits": 3, "group_size": 32, "quantizer": {"kind": "gptq"}}}


class Watched(InProcessPool):
    """Knows which worker ran which task."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.tasks: list[tuple[int, Task[object]]] = []

    def submit(self, worker: int, task: Task[object]) -> int:
        self.tasks.append((worker, task))
        return super().submit(worker, task)

    def workers_of(self, kind: type[Task[Any]], block: int) -> set[int]:
        return {worker for worker, task in self.tasks if isinstance(task, kind) and task.block_index == block}


def files_of(published: Published) -> dict[str, str]:
    """File -> sha256, of all but reports, which have times."""
    files = {name: entry.sha256 for name, entry in published.document.files.items()}
    return {name: sha256 for name, sha256 in files.items() if name not in (REPORT, REPORT_PAGE)}


@pytest.mark.parametrize(
    ("case", "recipe", "further"), [("mixtral", "W4A4, LRC", DRAWN), ("llama", "smoothed, ranks shared out", {})]
)
def test_the_artifact_is_that_of_one_worker(case: str, recipe: str, further: dict[str, Any], tmp_path: Path) -> None:
    checkpoint(case, tmp_path / "model", num_hidden_layers=2)
    made = {}
    for workers in (1, 2, 3):
        pool = Watched(workers)
        output = tmp_path / str(workers)
        calibration = {**CALIBRATION, **further}
        published = run_job(tmp_path / "model", output, RECIPES[recipe], calibration=calibration, pool=pool)
        made[workers] = files_of(published)
        for block in range(2):
            assert len(pool.workers_of(Solve, block)) == (0 if workers == 1 else workers)
            assert len(pool.workers_of(Propagate, block)) == (0 if workers == 1 else min(workers, 2 + len(further)))
        left = {path.name for path in (output / "artifacts" / "_work" / "blobs").iterdir()}
        named = [path.read_text() for path in (output / "artifacts" / "_work" / "commits" / "solve").glob("*")]
        assert bool(named) == (workers > 1)
        parts = {blob.sha256 for text in named for blob in SolvedRecord.model_validate_json(text).blobs}
        assert not left & parts, "parts of blocks are left behind"
    assert made[1] == made[2] == made[3]


def test_of_blocks_that_are_calibrated_apart_the_last_is_shared(tmp_path: Path) -> None:
    """By half of three workers; nobody calibrates it. Shards are copied and checked while blocks are solved."""
    checkpoint("mixtral", tmp_path / "model", num_hidden_layers=3)
    calibration = {**CALIBRATION, "propagate": "original"}
    pool = Watched(3)
    shared = run_job(tmp_path / "model", tmp_path / "3", GPTQ, calibration=calibration, pool=pool)
    assert [len(pool.workers_of(Solve, block)) for block in range(3)] == [0, 0, 2]
    assert [bool(pool.workers_of(Calibrate, block)) for block in range(3)] == [True, True, False]
    kinds = [type(task) for _, task in pool.tasks]
    assert kinds.index(Checksum) < len(kinds) - kinds[::-1].index(Compress) - 1
    assert files_of(shared) == files_of(run_job(tmp_path / "model", tmp_path / "1", GPTQ, calibration=calibration))


def test_segments_that_are_fewer_than_workers_are_shared(tmp_path: Path) -> None:
    """Two segments, and two workers at each block of both."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=3)
    calibration = {**CALIBRATION, "segment_blocks": 2}
    made = {}
    for workers in (1, 4):
        pool = Watched(workers)
        output = tmp_path / str(workers)
        made[workers] = files_of(run_job(tmp_path / "model", output, GPTQ, calibration=calibration, pool=pool))
        parts = [task.parts for _, task in pool.tasks if isinstance(task, Solve)]
        assert parts == ([2] * 6 if workers == 4 else [])
    assert made[1] == made[4]


class Deadly(Watched):
    """Workers that die of these tasks, once each: what they held is gone. tasks: kind and block."""

    def __init__(self, workers: int, *tasks: tuple[type[Task[Any]], int | None]) -> None:
        super().__init__(workers)
        self.deadly = list(tasks)

    def submit(self, worker: int, task: Task[object]) -> int:
        fatal = next((one for one in self.deadly if isinstance(task, one[0]) and task.block_index == one[1]), None)
        if fatal is None:
            return super().submit(worker, task)
        self.deadly.remove(fatal)
        self._members[worker].worker.close()
        self._members[worker] = Member(Worker("cpu"), shares=True)
        self._references.lost(worker)
        self.calls.append((worker, task.kind))
        died = Outcome(len(self.calls), worker, error=WorkerError("killed"), worker_died=True)
        self._finished.append(died)
        return died.ticket


def test_workers_that_die_of_any_part_leave_a_job_that_goes_on(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)

    def made(pool: Watched) -> dict[str, str]:
        return files_of(run_job(tmp_path / "model", tmp_path / str(id(pool)), GPTQ, calibration=CALIBRATION, pool=pool))

    pool = Deadly(2, (Solve, 0), (Propagate, 0), (Compress, 0), (Solve, 1), (Propagate, 1), (Compress, 1))
    assert made(pool) == made(Watched(1))
    assert not pool.deadly
    solved = [task.name for _, task in pool.tasks if isinstance(task, Solve)]
    assert len(solved) == len(set(solved)) == 4, "what others have solved is done again"


def test_a_job_on_another_number_of_workers_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    """Behind the first block, and with a part of the second; then on one worker, and on two that find all."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)

    class Killed(Watched):
        def submit(self, worker: int, task: Task[object]) -> int:
            if isinstance(task, Propagate) and task.block_index == 1:
                raise KeyboardInterrupt
            return super().submit(worker, task)

    def run(pool: Watched, output: str = "killed", **more: Any) -> dict[str, str]:
        return files_of(
            run_job(tmp_path / "model", tmp_path / output, GPTQ, calibration=CALIBRATION, pool=pool, **more)
        )

    with pytest.raises(KeyboardInterrupt):
        run(Killed(2))
    again, alone = Watched(2), Watched(1)
    finished = run(again)
    assert not again.workers_of(Solve, 0) | again.workers_of(Solve, 1)
    assert again.workers_of(Propagate, 1)
    assert finished == run(Watched(1), "undisturbed")
    # Another artifact of the same blocks, which finds them all.
    run(alone, validation={"windows": 2})
    assert not alone.workers_of(Compress, 0) | alone.workers_of(Compress, 1)


def test_a_model_whose_hidden_states_are_gone_is_run_again_from_finished_blocks(tmp_path: Path) -> None:
    """Nothing is solved for the first block, though its parts are gone with its hidden states."""
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    first = run_job(tmp_path / "model", tmp_path, GPTQ, calibration=CALIBRATION, workers=1)
    commits = tmp_path / "artifacts" / "_work" / "commits" / "block"
    (second,) = (path for path in commits.iterdir() if BlockRecord.model_validate_json(path.read_text()).index == 1)
    before = BlockRecord.model_validate_json(second.read_text())
    second.unlink()
    pool = Watched(2)
    published = run_job(
        tmp_path / "model", tmp_path, GPTQ, calibration=CALIBRATION, validation={"windows": 2}, pool=pool
    )
    assert published.document.id != first.document.id
    assert not pool.workers_of(Solve, 0)
    assert pool.workers_of(Propagate, 0)
    assert len(pool.workers_of(Solve, 1)) == 2
    assert BlockRecord.model_validate_json(second.read_text()).checkpoint == before.checkpoint
