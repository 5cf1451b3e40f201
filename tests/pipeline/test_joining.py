"""An adapter that is begun while the last blocks are still being made."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterweight.pipeline.artifact import Published
from counterweight.pipeline.artifact.shards import begun_behind
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.files import Join
from counterweight.workers.tasks.task import Task
from tests.models import checkpoint
from tests.pipeline.test_sharing import Deadly, Watched, files_of, run_job

RECIPE = {
    "weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}},
    "compensation": {"kind": "svd", "rank": {"count": 2}},
    "residual": {},
}
CALIBRATION = {"sequences": 12, "sequence_length": 32, "held_out": 0, "propagate": "original"}
LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    checkpoint("llama", root / "model", num_hidden_layers=LAYERS)
    return root / "model"


def made(model: Path, output: Path, pool: Watched) -> Published:
    return run_job(model, output, RECIPE, calibration=CALIBRATION, pool=pool)


def test_it_is_begun_by_the_worker_that_finishes_it_and_has_the_bytes_of_one_that_is_joined_at_the_end(
    model: Path, tmp_path: Path
) -> None:
    alone, together = Watched(1), Watched(3)
    files = files_of(made(model, tmp_path / "1", alone))
    assert files_of(made(model, tmp_path / "3", together)) == files
    assert {"compensation/adapter_model.safetensors", "residual/residual.safetensors"} <= files.keys()
    assert len([task for _, task in alone.tasks if isinstance(task, Join)]) == 2
    for what in ("adapter", "residual store"):
        joins = [(worker, task) for worker, task in together.tasks if isinstance(task, Join) and task.what == what]
        assert [len(task.parts) for _, task in joins] == [1, 2, 4]
        assert [len(task.awaited) for _, task in joins] == [3, 2, 0]
        assert len({worker for worker, _ in joins}) == 1
    kinds = [type(task) for _, task in together.tasks]
    assert kinds.index(Join) < len(kinds) - kinds[::-1].index(Compress) - 1


class Dies(Deadly):
    """A worker dies of finishing the adapter, and with it what it has begun."""

    died = False

    def submit(self, worker: int, task: Task[object]) -> int:
        if not self.died and isinstance(task, Join) and not task.awaited:
            self.died, self.deadly = True, [(Join, None)]
        return super().submit(worker, task)


def test_a_worker_that_dies_with_it_leaves_it_to_another(model: Path, tmp_path: Path) -> None:
    pool = Dies(3)
    assert files_of(made(model, tmp_path / "dies", pool)) == files_of(made(model, tmp_path / "1", Watched(1)))
    assert not pool.deadly
    joins = [worker for worker, task in pool.tasks if isinstance(task, Join) and task.what == "adapter"]
    assert len(joins) == 3, "a task that killed its worker is not among them"


def test_it_is_begun_where_each_worker_has_a_block_left_and_gone_on_with_where_two_are() -> None:
    assert [begun_behind(32, workers, "original") for workers in (1, 2, 8)] == [[], [30], [24, 30]]
    assert begun_behind(2, 2, "original") == begun_behind(0, 8, "original") == []
    assert begun_behind(4, 8, "original") == [2]


def test_workers_that_share_each_block_do_not_wait_for_one_that_joins(model: Path, tmp_path: Path) -> None:
    assert not begun_behind(32, 8, "compressed")
    pool = Watched(3)
    run_job(model, tmp_path, RECIPE, calibration={**CALIBRATION, "propagate": "compressed"}, pool=pool)
    assert [len(task.awaited) for _, task in pool.tasks if isinstance(task, Join)] == [0, 0]
