"""The chain of block tasks on simulated workers: no process, no tensor, records in a dictionary."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterweight.pipeline.chain import Chain, Link, Phase
from counterweight.workers.tasks.block import CALIBRATE, COMPRESS, BlockRecord, BlockSpec
from counterweight.workers.tasks.records import HiddenRecord, Timing
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.workspace import AnyRecord, Blob, Workspace

Propagate = Literal["original", "compressed"]

SETTING = Setting(source="file:///model", config={}, workspace="file:///work", compute_dtype="float32", device="cpu")


def blob(*content: object) -> Blob:
    return Blob(sha256=hashlib.sha256(repr(content).encode()).hexdigest(), size=1)


FIRST = (blob("embedding", 0), blob("embedding", 1))


class MemoryWorkspace(Workspace):
    """Records and blobs that are only remembered."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Any] = {}
        self.blobs: set[str] = {each.sha256 for each in FIRST}

    def put(self, *blobs: Blob) -> None:
        self.blobs |= {each.sha256 for each in blobs}

    def has(self, blob: Blob) -> bool:
        return blob.sha256 in self.blobs

    def discard(self, blob: Blob) -> None:
        self.blobs.discard(blob.sha256)

    def lookup(self, kind: str, key: str, record: type[AnyRecord]) -> AnyRecord | None:
        return self.records.get((kind, key))

    def commit(self, kind: str, key: str, record: AnyRecord) -> AnyRecord:
        earlier: AnyRecord = self.records.setdefault((kind, key), record)
        return earlier


class Cluster:
    """Simulated workers on one chain; each holds the statistics of the last block whose first half it did."""

    def __init__(self, workspace: MemoryWorkspace, *, count: int, workers: int, propagate: Propagate = "original"):
        self.workspace, self.propagate = workspace, propagate
        self.chain = Chain.open(workspace, self.spec_of, FIRST, count, propagate)
        self.running: dict[int, Link] = {}
        self.workers = range(workers)
        self.holds: dict[int, int | None] = dict.fromkeys(self.workers)
        self.started: list[tuple[str, int, int]] = []
        self.recalculated: list[int] = []

    def spec_of(self, index: int, inputs: tuple[Blob, ...]) -> BlockSpec:
        return BlockSpec(
            setting=SETTING,
            index=index,
            tensors={f"model.layers.{index}.w": "0" * 64},
            inputs=inputs,
            recipe={},
            propagate=self.propagate,
        )

    def assign(self) -> None:
        """What the orchestrator's step does before it waits."""
        for worker in self.workers:
            if worker in self.running:
                continue
            link = self.chain.assign(worker)
            if link is None:
                continue
            index = link.spec.index
            assert index not in [other.spec.index for other in self.running.values()], "a block on two workers"
            self.started.append((link.phase.value, index, worker))
            self.running[worker] = link

    def finish(self, worker: int, *, dies: bool = False, fails: bool = False) -> None:
        """A worker's task ends: with its record, with its death, or with an error that may mend."""
        link = self.running.pop(worker)
        if dies:
            self.holds[worker] = None
            self.chain.lost(worker)
            self.chain.settle(link, worker, None)
        elif fails or not self._readable(worker, link):
            self.holds[worker] = None
            self.chain.settle(link, worker, None)
        else:
            self.chain.settle(link, worker, self._work(worker, link))

    def work(self, worker: int) -> None:
        """A worker does its task; nobody hears of it."""
        self._work(worker, self.running[worker])

    def run(self) -> None:
        """To the end, one task after another, without faults."""
        steps = 0
        while not self.chain.done:
            self.assign()
            assert self.running, "nothing runs, nothing can start, and blocks are missing"
            self.finish(min(self.running))
            steps += 1
            assert steps <= 4 * self.chain.count, "no progress"

    def _readable(self, worker: int, link: Link) -> bool:
        """A half whose statistics are not in memory reads the block's inputs."""
        held = link.phase is Phase.COMPRESS and self.holds[worker] == link.spec.index and self.propagate == "original"
        return held or all(self.workspace.has(each) for each in link.spec.inputs)

    def _work(self, worker: int, link: Link) -> HiddenRecord | BlockRecord:
        spec = link.spec
        outputs = tuple(blob(self.propagate, spec.index, each.sha256) for each in spec.inputs)
        if link.phase is Phase.CALIBRATE:
            assert self.propagate == "original", "with compressed propagation there is only the whole task"
            self.holds[worker] = spec.index
            self.workspace.put(*outputs)
            return self.workspace.commit(
                CALIBRATE, spec.calibrate_key(), HiddenRecord(outputs=outputs, timing=Timing())
            )
        if self.holds[worker] != spec.index:
            self.recalculated.append(spec.index)
        self.holds[worker] = None
        checkpoint = blob("checkpoint", spec.index)
        self.workspace.put(checkpoint, *(outputs if self.propagate == "compressed" else ()))
        record = BlockRecord(
            index=spec.index,
            checkpoint=checkpoint,
            adapter=None,
            outputs=outputs if self.propagate == "compressed" else (),
            tensors={},
            factors={},
            modules=(),
            formats={},
            kept_bits=0,
            ledger=(),
            timing=Timing(),
        )
        return self.workspace.commit(COMPRESS, spec.key(), record)

    def halves(self, half: str) -> list[int]:
        """Blocks of which a half was started, in order."""
        return [index for name, index, _ in self.started if name == half]


def finished(count: int, propagate: Propagate = "original") -> MemoryWorkspace:
    """What a job that ran to its end leaves behind, hidden states included."""
    cluster = Cluster(MemoryWorkspace(), count=count, workers=1, propagate=propagate)
    cluster.run()
    return cluster.workspace


def forget_blocks(workspace: MemoryWorkspace, indices: Iterable[int]) -> None:
    """Removes the records of these blocks, as if the job had been killed before."""
    wanted = set(indices)
    for key, record in list(workspace.records.items()):
        if key[0] == COMPRESS and record.index in wanted:
            del workspace.records[key]


def boundaries(cluster: Cluster) -> list[tuple[Blob, ...]]:
    """Hidden states behind each block."""
    found: list[tuple[Blob, ...]] = []
    inputs = FIRST
    for index in range(cluster.chain.count):
        inputs = tuple(blob(cluster.propagate, index, each.sha256) for each in inputs)
        found.append(inputs)
    return found


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_block_is_solved_once_and_first_halves_come_in_order(workers: int) -> None:
    cluster = Cluster(MemoryWorkspace(), count=6, workers=workers)
    cluster.run()
    assert cluster.halves("forward") == [0, 1, 2, 3, 4, 5]
    assert sorted(cluster.halves("block")) == [0, 1, 2, 3, 4, 5]
    assert cluster.recalculated == []
    assert [record.index for record in cluster.chain.records] == [0, 1, 2, 3, 4, 5]


def test_the_half_done_block_of_a_worker_is_its_next() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=2)
    cluster.assign()
    assert cluster.started == [("forward", 0, 0)]  # block 1 has no inputs yet
    cluster.finish(0)
    cluster.assign()
    assert cluster.started[1:] == [("block", 0, 0), ("forward", 1, 1)]


def test_second_halves_run_beside_the_chain() -> None:
    """With five workers the chain of first halves never waits for a solve."""
    cluster = Cluster(MemoryWorkspace(), count=5, workers=5)
    for _ in range(5):
        cluster.assign()
        (forward,) = [worker for worker, link in cluster.running.items() if link.phase is Phase.CALIBRATE]
        cluster.finish(forward)
    cluster.assign()
    assert sorted(link.spec.index for link in cluster.running.values()) == [0, 1, 2, 3, 4]
    assert {link.phase for link in cluster.running.values()} == {Phase.COMPRESS}


def test_a_dead_holders_block_goes_to_another_worker_and_the_chain_goes_on() -> None:
    cluster = Cluster(MemoryWorkspace(), count=4, workers=2)
    cluster.assign()
    cluster.finish(0)
    cluster.assign()  # worker 0 solves block 0, worker 1 is on the chain
    cluster.finish(0, dies=True)
    cluster.finish(1)
    cluster.assign()
    assert cluster.started[3:] == [("block", 0, 0), ("block", 1, 1)]
    cluster.run()
    assert cluster.halves("forward") == [0, 1, 2, 3]
    assert cluster.recalculated == [0]


def test_a_first_half_that_died_is_run_again() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=1)
    cluster.assign()
    cluster.finish(0, dies=True)
    cluster.run()
    assert cluster.halves("forward") == [0, 0, 1, 2]
    assert sorted(cluster.halves("block")) == [0, 1, 2]


def test_a_worker_that_dies_after_its_commit_loses_nothing() -> None:
    """The task is asked for again, and its record is found: the commit holds what was there first."""
    cluster = Cluster(MemoryWorkspace(), count=2, workers=1)
    cluster.assign()
    cluster.work(0)
    cluster.finish(0, dies=True)
    cluster.run()
    assert len([key for key in cluster.workspace.records if key[0] == CALIBRATE]) == 2


@pytest.mark.parametrize("propagate", ["original", "compressed"])
@pytest.mark.parametrize("done", [(), (0,), (0, 1), (0, 1, 2, 3), (1, 3), (2,)])
def test_a_resumed_job_runs_what_is_missing(propagate: Propagate, done: tuple[int, ...]) -> None:
    workspace = finished(4, propagate)
    missing = [index for index in range(4) if index not in done]
    forget_blocks(workspace, missing)
    cluster = Cluster(workspace, count=4, workers=2, propagate=propagate)
    reused = [state.record.index for state in cluster.chain.blocks if state.record is not None and state.reused]
    # A compressed chain is followed record by record: behind a gap, the keys are not known yet.
    known = done if propagate == "original" else [index for index in done if index < min(missing, default=4)]
    assert reused == list(known)
    cluster.run()
    assert sorted(cluster.halves("block")) == [index for index in range(4) if index not in known]
    assert len(cluster.chain.records) == 4


def test_a_finished_job_has_nothing_to_do() -> None:
    cluster = Cluster(finished(4), count=4, workers=1)
    assert cluster.chain.done
    assert cluster.chain.assign(0) is None


@pytest.mark.parametrize(
    ("missing", "gone", "forwards"),
    [
        ([3], [0, 1, 2, 3, 4], [0, 1, 2, 3]),  # everything before the missing block must be made again
        ([3], [2], [2, 3]),  # from the last boundary that is there
        ([3], [0, 1, 3, 4], [3]),  # its inputs are there
        ([0], [0, 1, 2, 3, 4], [0]),  # the embedding's output is always there
        ([1, 4], [0, 3], [0, 1, 3, 4]),
        ([], [0, 1, 2, 3, 4], []),
    ],
)
def test_only_the_first_halves_that_are_needed_are_run_again(
    missing: list[int], gone: list[int], forwards: list[int]
) -> None:
    """Hidden states are discarded when a job has been published; a job that shares its blocks makes them again."""
    workspace = finished(5)
    forget_blocks(workspace, missing)
    cluster = Cluster(workspace, count=5, workers=2)
    behind = boundaries(cluster)
    for index in gone:
        for each in behind[index]:
            workspace.discard(each)
    cluster = Cluster(workspace, count=5, workers=2)
    cluster.run()
    assert sorted(cluster.halves("forward")) == forwards
    assert sorted(cluster.halves("block")) == missing


def test_a_block_whose_shard_is_gone_is_not_done() -> None:
    workspace = finished(3)
    workspace.discard(blob("checkpoint", 1))
    cluster = Cluster(workspace, count=3, workers=1)
    cluster.run()
    assert cluster.halves("block") == [1]


def test_compressed_propagation_is_one_task_per_block_on_the_outputs_of_the_one_before() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=2, propagate="compressed")
    seen: list[tuple[Blob, ...]] = []
    while not cluster.chain.done:
        cluster.assign()
        assert len(cluster.running) == 1
        seen += [link.spec.inputs for link in cluster.running.values()]
        cluster.finish(next(iter(cluster.running)))
    assert [name for name, _, _ in cluster.started] == ["block"] * 3
    assert seen == [FIRST, *boundaries(cluster)[:2]]


def test_compressed_outputs_that_are_gone_are_made_again_from_the_last_that_are_there() -> None:
    workspace = finished(4, "compressed")
    forget_blocks(workspace, [3])
    cluster = Cluster(workspace, count=4, workers=1, propagate="compressed")
    for index in (1, 2):
        for each in boundaries(cluster)[index]:
            workspace.discard(each)
    cluster = Cluster(workspace, count=4, workers=1, propagate="compressed")
    cluster.run()
    assert cluster.halves("block") == [1, 2, 3]


@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_hidden_states_that_vanish_while_the_job_runs_are_made_again(propagate: Propagate) -> None:
    """Two jobs share their work; the one that is published first discards what the other still needs."""
    workspace = finished(4, propagate)
    forget_blocks(workspace, [2, 3])
    cluster = Cluster(workspace, count=4, workers=1, propagate=propagate)
    cluster.assign()
    for behind in boundaries(cluster):
        for each in behind:
            workspace.discard(each)
    cluster.run()
    assert {0, 1, 2} <= set(cluster.halves("forward" if propagate == "original" else "block"))
    assert len(cluster.chain.records) == 4


def test_the_embeddings_output_is_not_among_what_is_discarded() -> None:
    """Everything else follows from it, so another job on the same chain can always go on."""
    cluster = Cluster(MemoryWorkspace(), count=3, workers=1)
    cluster.run()
    assert Counter(cluster.chain.discardable) == Counter(each for behind in boundaries(cluster) for each in behind)


def test_a_solve_that_failed_holds_nothing_any_more() -> None:
    """Its second try reads the block's inputs again; when those have vanished meanwhile, the first halves make them anew."""
    workspace = finished(2, "original")
    forget_blocks(workspace, {1})
    cluster = Cluster(workspace, count=2, workers=1)
    cluster.assign()
    cluster.finish(0)
    assert cluster.started == [("forward", 1, 0)]
    cluster.assign()
    cluster.finish(0, fails=True)
    for behind in boundaries(cluster):
        for each in behind:
            workspace.discard(each)
    cluster.run()
    assert len(cluster.chain.records) == 2


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_happens_in_whatever_order_the_chain_ends(data: st.DataObject) -> None:
    """Workers finish in any order, die, fail, and hidden states vanish: while there are fewer faults than patience,
    every block is solved, no half runs without its inputs, and nothing hangs."""
    propagate: Propagate = data.draw(st.sampled_from(["original", "compressed"]))
    count = data.draw(st.integers(1, 6))
    workers = data.draw(st.sampled_from([1, 2, 3, 5]))
    workspace = MemoryWorkspace()
    if data.draw(st.booleans()):
        workspace = finished(count, propagate)
        forget_blocks(workspace, data.draw(st.sets(st.integers(0, count - 1))))
    cluster = Cluster(workspace, count=count, workers=workers, propagate=propagate)
    hidden = [each for behind in boundaries(cluster) for each in behind]
    for each in data.draw(st.sets(st.sampled_from(hidden))):
        workspace.discard(each)
    cluster = Cluster(workspace, count=count, workers=workers, propagate=propagate)
    faults = data.draw(st.integers(0, 6))
    for _ in range(20 * (count + 1)):
        if cluster.chain.done:
            break
        cluster.assign()
        assert cluster.running, "nothing runs, nothing can start, and blocks are missing"
        worker = data.draw(st.sampled_from(sorted(cluster.running)))
        event = data.draw(st.sampled_from(["done", "dies", "fails", "dies late", "vanish"])) if faults else "done"
        faults -= event != "done"
        if event == "vanish":
            for each in data.draw(st.sets(st.sampled_from(hidden))):
                workspace.discard(each)
        elif event == "dies late" and cluster._readable(worker, cluster.running[worker]):
            cluster.work(worker)
            cluster.finish(worker, dies=True)
        else:
            cluster.finish(worker, dies=event.startswith("dies"), fails=event == "fails")
    assert cluster.chain.done
    assert [record.index for record in cluster.chain.records] == list(range(count))
    if not cluster.running:
        assert cluster.chain.assign(0) is None or propagate == "original"
