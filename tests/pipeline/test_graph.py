"""The graph of block tasks on simulated workers: no process, no tensor, records in a dictionary."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterweight.pipeline.blocks import BlockNodes, BlockRecipe, Blocks, Budget
from counterweight.pipeline.graph import Graph, Node
from counterweight.pipeline.needs import Needs
from counterweight.pipeline.shared_blocks import balanced, in_stretches
from counterweight.workers.arithmetic.units import Unit
from counterweight.workers.tasks.block import CALIBRATE, COMPRESS, GAINS, BlockRecord, BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.gains import Gains, GainsRecord
from counterweight.workers.tasks.prefetch import Prefetch
from counterweight.workers.tasks.propagate import Propagate, PropagatedRecord
from counterweight.workers.tasks.records import HiddenRecord, Timing
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.tasks.solve import Solve, SolvedRecord
from counterweight.workers.workspace import AnyRecord, Blob, Record, Workspace

Mode = Literal["original", "compressed"]

SETTING = Setting(source="file:///model", config={}, workspace="file:///work", compute_dtype="float32", device="cpu")


def blob(*content: object) -> Blob:
    return Blob(sha256=hashlib.sha256(repr(content).encode()).hexdigest(), size=1)


FIRST = tuple(blob("embedding", shard) for shard in range(3))
EMBED = Embed(setting=SETTING, tokens=blob("tokens"), tensor=("embedding", "0" * 64))


class MemoryWorkspace(Workspace):
    """Records and blobs that are only remembered."""

    def __init__(self) -> None:
        embedded = HiddenRecord(outputs=FIRST, timing=Timing())
        self.records: dict[tuple[str, str], Any] = {(EMBED.kind, EMBED.key()): embedded}
        self.blobs: set[str] = {each.sha256 for each in FIRST}

    def put(self, *blobs: Blob) -> None:
        self.blobs |= {each.sha256 for each in blobs}

    def has(self, blob: Blob) -> bool:
        return blob.sha256 in self.blobs

    def discard(self, *blobs: Blob) -> None:
        self.blobs -= {each.sha256 for each in blobs}

    def lookup(self, kind: str, key: str, record: type[AnyRecord]) -> AnyRecord | None:
        return self.records.get((kind, key))

    def commit(self, kind: str, key: str, record: AnyRecord) -> AnyRecord:
        earlier: AnyRecord = self.records.setdefault((kind, key), record)
        return earlier


BlockTask = Calibrate | Gains | Compress | Solve | Propagate

UNITS = tuple(Unit(linears=(name,), flops=flops) for name, flops in (("a", 3), ("b", 1), ("c", 2)))
"""Of each block that workers share."""


class Cluster:
    """Simulated workers on one graph; each holds the statistics of the last block that it calibrated, with a budget of all.

    stretch: shards that a block is calibrated on at a time. holds: worker -> block -> shards that its sums are over. every:
    blocks between two whose hidden states are written, 0 for none; the others' are in the worker's memory, which all can read.
    None: all are written.
    """

    def __init__(
        self,
        workspace: MemoryWorkspace,
        *,
        count: int,
        workers: int,
        propagate: Mode = "original",
        budget: bool = False,
        hold: int = 100,
        stretch: int = len(FIRST),
        segment: int | None = None,
        ahead: bool = False,
        every: int | None = None,
        shared: bool = False,
    ):
        self.workspace, self.propagate, self.count, self.hold = workspace, propagate, count, hold
        self.shared = 0
        self.every = every
        self.memory: dict[int, set[Blob]] = {worker: set() for worker in range(workers)}
        self.graph = Graph(workspace, hold_bytes=hold)
        embedded: Node[HiddenRecord] = self.graph.add(lambda: EMBED)
        shares = Budget(blocks=frozenset(range(count)), share=self._share, bytes=[1] * count)
        nodes = BlockNodes(
            graph=self.graph,
            recipes=[{}] * count,
            spec_of=self.spec_of,
            propagate=propagate,
            budget=shares if budget else None,
            stretches=[range(len(FIRST))[start : start + stretch] for start in range(0, len(FIRST), stretch)],
            segment=segment,
            workers=workers,
            ahead=ahead,
            lasting=self.lasting,
            units=[UNITS] * count if shared else (),
        )
        self.blocks: Blocks = nodes.add([embedded])
        self.graph.open()
        self.running: dict[int, Node[object]] = {}
        self.workers = range(workers)
        self.holds: dict[int, dict[int, int]] = {worker: {} for worker in self.workers}
        self.started: list[tuple[str, int, int]] = []
        self.recalculated: list[int] = []
        self.faulty = False

    @property
    def done(self) -> bool:
        return all(node.done for node in self.blocks.compress)

    def lasting(self, block: int) -> bool:
        """Whether hidden states behind a block are written."""
        return self.every is None or (self.every > 0 and (block + 1) % self.every == 0)

    def _has(self, each: Blob) -> bool:
        return self.workspace.has(each) or any(each in kept for kept in self.memory.values())

    def _pass_on(self, worker: int, block: int, outputs: Iterable[Blob]) -> None:
        if self.lasting(block):
            self.workspace.put(*outputs)
        else:
            self.memory[worker].update(outputs)

    def _share(self, gains: Any) -> list[BlockRecipe]:
        assert sorted(gains) == list(range(self.count)), "shared out before all gains are known"
        self.shared += 1
        return [{}] * self.count

    def spec_of(
        self,
        index: int,
        recipe: BlockRecipe,
        inputs: tuple[Blob, ...],
        original_inputs: tuple[Blob, ...],
        propagate: Mode,
    ) -> BlockSpec:
        return BlockSpec(
            setting=SETTING,
            index=index,
            tensors={f"model.layers.{index}.w": "0" * 64},
            inputs=inputs,
            original_inputs=original_inputs,
            recipe=recipe,
            propagate=propagate,
        )

    def assign(self) -> None:
        """What the dispatcher does before it waits."""
        for worker in self.workers:
            if worker in self.running:
                continue
            node = self.graph.assign(worker)
            if node is None:
                continue
            if isinstance(node.made(), Embed):
                self.started.append(("embed", -1, worker))
            else:
                task = block_task(node)
                index = task.block.index
                others = [other.made() for other in self.running.values()]
                alike = [(other.block_index, passing(other)) for other in others]
                divided = isinstance(task, Solve | Propagate) or (isinstance(task, Compress) and task.solved)
                assert divided or (index, passing(task)) not in alike, "a block on two workers"
                self._assert_one_block_at_a_time(worker, task)
                self.started.append((task.kind, index, worker))
            self.running[worker] = node

    def finish(self, worker: int, *, dies: bool = False, fails: bool = False) -> None:
        """A worker's task ends: with its record, with its death, or with an error that may mend."""
        self._finish(worker, dies=dies, fails=fails)
        assert self.graph.needed() == Needs(self.graph.nodes).places, "not what a look at all nodes gives"

    def _finish(self, worker: int, *, dies: bool, fails: bool) -> None:
        node = self.running.pop(worker)
        if dies:
            self.holds[worker] = {}
            self.memory[worker] = set()
            self.graph.lost(worker)
            self.graph.failed(node)
        elif fails or not (readable := self._readable(worker, node)):
            if not isinstance(node.made(), Embed):
                self._forget(worker, block_task(node).block.index)
            self.graph.failed(node, gone=not fails and not readable)
        else:
            self.graph.settle(node, worker, self._work(worker, node))
        unread = self.graph.unread()
        self.memory = {worker: kept.difference(unread) for worker, kept in self.memory.items()}

    def work(self, worker: int) -> None:
        """A worker does its task; nobody hears of it."""
        self._work(worker, self.running[worker])

    def run(self) -> None:
        """To the end, one task after another, without faults."""
        steps = 0
        while not self.done:
            self.assign()
            assert self.running, "nothing runs, nothing can start, and blocks are missing"
            self.finish(min(self.running))
            steps += 1
            assert steps <= 8 * (self.count + len(self.workers)) + 1, "no progress"

    def _assert_one_block_at_a_time(self, worker: int, task: BlockTask) -> None:
        """A worker that waits for shards of a block begins no other, unless nothing runs that could bring them."""
        waiting = [index for index, shards in self.holds[worker].items() if shards < len(FIRST)]
        if isinstance(task, Calibrate) and not task.start and self.running and not self.faulty:
            assert not waiting or waiting == [task.block.index], "a second block is begun"

    def _forget(self, worker: int, index: int) -> None:
        self.holds[worker].pop(index, None)

    def _readable(self, worker: int, node: Node[object]) -> bool:
        """A task whose statistics are not in memory reads the block's inputs."""
        if isinstance(node.made(), Embed | Prefetch):
            return True
        task = block_task(node)
        if isinstance(task, Propagate | Compress) and not all(map(self._has, parts_read(task))):
            return False
        if isinstance(task, Propagate):
            return all(map(self._has, task.block.inputs[task.start : task.stop]))
        if isinstance(task, Compress) and task.solved:
            return True
        shards = self.holds[worker].get(task.block.index) if task.block.propagate == "original" else None
        start, stop = (task.start, task.stop) if isinstance(task, Calibrate) else [len(task.block.inputs)] * 2
        again = shards is None or shards != start or (isinstance(task, Calibrate) and not start)
        return all(self._has(each) for each in task.block.inputs[0 if again else start : stop])

    def _calibrated(self, worker: int, task: BlockTask) -> None:
        """The statistics are in memory from now on, those of others as far as there is room."""
        index = task.block.index
        start, end = (task.start, task.stop) if isinstance(task, Calibrate) else [len(task.block.inputs)] * 2
        held = self.holds[worker].pop(index, 0)
        if held != start:
            self.recalculated.append(index)
        kept = list(self.holds[worker].items())[-self.hold :] if self.hold else []
        self.holds[worker] = {**dict(kept), index: end}

    def _work(self, worker: int, node: Node[object]) -> Record | None:
        if isinstance(node.made(), Embed):
            self.workspace.put(*FIRST)
            return HiddenRecord(outputs=FIRST, timing=Timing())
        if isinstance(node.made(), Prefetch):
            return None
        task = block_task(node)
        spec = task.block
        outputs = tuple(blob(spec.propagate, spec.index, each.sha256) for each in spec.inputs)
        if spec.propagate == "original":
            self._calibrated(worker, task)
        if isinstance(task, Calibrate):
            assert spec.propagate == "original", "with compressed propagation there is only the whole task"
            own = outputs[task.start : task.stop]
            self._pass_on(worker, spec.index, own)
            if task.stop == task.shards:
                record = HiddenRecord(outputs=outputs, timing=Timing())
                self.workspace.commit(CALIBRATE, spec.calibrate_key(), record)
            return HiddenRecord(outputs=own, timing=Timing())
        if isinstance(task, Solve):
            if (found := task.lookup(self.workspace)) is not None and all(map(self._has, found.blobs)):
                return found
            part = blob("part", spec.index, task.linears)
            self.workspace.put(part)
            solved = SolvedRecord(blobs=(part,), formats={}, modules=(), timing=Timing())
            return self.workspace.commit(task.kind, task.key(), solved)
        if isinstance(task, Propagate):
            own = outputs[task.start : task.stop]
            self._pass_on(worker, spec.index, own)
            return PropagatedRecord(outputs=own, timing=Timing())
        if isinstance(task, Gains):
            if not task.keep:
                self._forget(worker, spec.index)
            return self.workspace.commit(GAINS, spec.key(), GainsRecord(gains={}, outputs=outputs))
        if spec.propagate == "original":
            self._forget(worker, spec.index)
        checkpoint = blob("checkpoint", spec.index)
        self.workspace.put(checkpoint)
        if self.propagate == "compressed" and not task.solved:
            self._pass_on(worker, spec.index, outputs)
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
        """Blocks of which a task of this kind was started, in order."""
        return [index for name, index, _ in self.started if name == half]


def block_task(node: Node[object]) -> BlockTask:
    task = node.made()
    assert isinstance(task, Prefetch | Calibrate | Gains | Compress | Solve | Propagate)
    return task


def parts_read(task: Propagate | Compress) -> list[Blob]:
    """Blobs of solved linears that it reads."""
    return [each for solved in task.solved for each in solved.blobs]


def passing(task: object) -> bool:
    """Whether it only runs the original over a block, which may be compressed meanwhile."""
    return isinstance(task, Calibrate) and task.passing


def finished(count: int, propagate: Mode = "original") -> MemoryWorkspace:
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
    for index in range(cluster.count):
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
    assert [record.index for record in cluster.blocks.records] == [0, 1, 2, 3, 4, 5]


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
        (forward,) = [worker for worker, node in cluster.running.items() if isinstance(node.made(), Calibrate)]
        cluster.finish(forward)
    cluster.assign()
    assert sorted(block_task(node).block.index for node in cluster.running.values()) == [0, 1, 2, 3, 4]
    assert {type(node.made()) for node in cluster.running.values()} == {Compress}


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_shards_stream_through_the_blocks(workers: int) -> None:
    """No stretch is calibrated twice, and all of a block's where its statistics are."""
    cluster = Cluster(MemoryWorkspace(), count=5, workers=workers, stretch=1)
    cluster.run()
    assert sorted(cluster.halves("forward")) == sorted([0, 1, 2, 3, 4] * len(FIRST))
    assert cluster.recalculated == []
    for index in range(5):
        assert len({worker for _, block, worker in cluster.started if block == index}) == 1


def test_a_block_begins_when_the_first_shard_has_left_the_one_before() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=3, stretch=1)
    cluster.assign()
    cluster.finish(0)
    cluster.assign()
    assert cluster.started == [("forward", 0, 0), ("forward", 0, 0), ("forward", 1, 1)]
    cluster.finish(1)  # block 1 waits for the second shard; worker 2 goes on with the first
    cluster.assign()
    assert cluster.started[3:] == [("forward", 2, 2)]
    cluster.finish(0)
    cluster.assign()
    assert cluster.started[4:] == [("forward", 0, 0), ("forward", 1, 1)]


def test_a_worker_that_dies_amid_a_block_is_followed_by_one_that_runs_its_shards_again() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=2, stretch=1)
    for worker in (0, 0, 1):
        cluster.assign()
        cluster.finish(worker)
    cluster.assign()
    cluster.finish(0, dies=True)  # in the last shard of block 0
    cluster.run()
    assert cluster.recalculated == [0]
    assert sorted(cluster.halves("block")) == [0, 1, 2]


def test_a_job_that_was_killed_amid_its_blocks_goes_on_with_the_shards_that_are_missing() -> None:
    first = Cluster(MemoryWorkspace(), count=3, workers=3, stretch=1)
    for worker in (0, 0, 1):
        first.assign()
        first.finish(worker)
    again = Cluster(first.workspace, count=3, workers=3, stretch=1)
    again.run()
    assert again.recalculated == []
    whole = Cluster(first.workspace, count=3, workers=1)
    whole.run()
    assert whole.started == []


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
def test_a_resumed_job_runs_what_is_missing(propagate: Mode, done: tuple[int, ...]) -> None:
    workspace = finished(4, propagate)
    missing = [index for index in range(4) if index not in done]
    forget_blocks(workspace, missing)
    cluster = Cluster(workspace, count=4, workers=2, propagate=propagate)
    reused = [record.index for record in cluster.blocks.reused]
    # A compressed chain is followed record by record: behind a gap, the keys are not known yet.
    known = done if propagate == "original" else [index for index in done if index < min(missing, default=4)]
    assert reused == list(known)
    cluster.run()
    assert sorted(cluster.halves("block")) == [index for index in range(4) if index not in known]
    assert len(cluster.blocks.records) == 4


def test_a_finished_job_has_nothing_to_do() -> None:
    cluster = Cluster(finished(4), count=4, workers=1)
    assert cluster.done
    assert cluster.graph.assign(0) is None


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
    while not cluster.done:
        cluster.assign()
        assert len(cluster.running) == 1
        seen += [block_task(node).block.inputs for node in cluster.running.values()]
        cluster.finish(next(iter(cluster.running)))
    assert [name for name, _, _ in cluster.started] == ["block"] * 3
    assert seen == [FIRST, *boundaries(cluster)[:2]]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_segments_begin_with_what_the_original_makes(workers: int) -> None:
    """Which runs over the blocks before the last segment and gathers nothing; segments run beside each other."""
    cluster = Cluster(MemoryWorkspace(), count=6, workers=workers, propagate="compressed", segment=2)
    seen: dict[int, tuple[Blob, ...]] = {}
    beside = 0
    while not cluster.done:
        cluster.assign()
        tasks = [block_task(node) for node in cluster.running.values() if not isinstance(node.made(), Embed)]
        assert all(task.passing for task in tasks if isinstance(task, Calibrate))
        compressing = [task.block for task in tasks if isinstance(task, Compress)]
        seen |= {spec.index: spec.inputs for spec in compressing}
        beside = max(beside, len(compressing))
        cluster.finish(min(cluster.running))
    assert cluster.halves("forward") == [0, 1, 2, 3]
    assert sorted(cluster.halves("block")) == list(range(6))
    assert beside == workers
    entering = FIRST
    for index in range(6):
        if not index % 2:
            assert seen[index] == entering
            compressed = tuple(blob("compressed", index, each.sha256) for each in entering)
            assert seen[index + 1] == compressed
        entering = tuple(blob("original", index, each.sha256) for each in entering)


def test_what_a_worker_reads_ahead_is_the_block_that_it_takes_next() -> None:
    """In `original` blocks go round; a segment's come one after the other, then another segment."""

    def ahead(count: int, workers: int, **options: Any) -> dict[int, int | None]:
        cluster = Cluster(MemoryWorkspace(), count=count, workers=workers, **options)
        cluster.run()
        tasks = [node.made() for node in cluster.blocks.compress]
        following = {task.block.index: task.following for task in tasks if isinstance(task, Compress)}
        return {index: None if spec is None else spec.index for index, spec in following.items()}

    assert ahead(5, 2) == {0: 2, 1: 3, 2: 4, 3: None, 4: None}
    assert ahead(3, 1, propagate="compressed") == {0: 1, 1: 2, 2: None}
    assert ahead(4, 1, propagate="compressed", segment=2) == {0: 1, 1: 2, 2: 3, 3: None}
    beside = ahead(8, 2, propagate="compressed", segment=4)
    assert [beside[index] for index in (0, 1, 2, 4, 5, 6)] == [1, 2, 3, 5, 6, 7]
    assert ahead(3, 2, propagate="compressed") == {0: None, 1: None, 2: None}
    assert ahead(3, 1, budget=True) == {0: None, 1: None, 2: None}


@pytest.mark.parametrize("dies", [False, True])
def test_a_worker_reads_a_block_while_it_waits_for_what_enters_it(dies: bool) -> None:
    """One that dies then leaves its block to whoever is idle, and it is not read early again."""
    cluster = Cluster(MemoryWorkspace(), count=4, workers=3, ahead=True)
    cluster.assign()
    assert cluster.started == [("prefetch", 0, 0), ("prefetch", 1, 1), ("prefetch", 2, 2)]
    cluster.finish(1)
    cluster.finish(2)
    cluster.assign()
    assert len(cluster.started) == 3, "who has read a block waits for it"
    if dies:
        cluster.graph.lost(1)
    cluster.run()
    owners = {(kind, index): worker for kind, index, worker in reversed(cluster.started)}
    if not dies:
        assert all(owners["forward", index] == owners["prefetch", index] for index in range(4))
    assert cluster.halves("prefetch") == [0, 1, 2, 3]
    assert cluster.halves("forward") == [0, 1, 2, 3]


def test_what_takes_longer_than_others_begins_before_those_that_were_added_before_it() -> None:
    graph = Graph()
    first = graph.add(lambda: EMBED)
    long = graph.add(lambda: EMBED, soon=True)
    behind = graph.add(lambda: EMBED, soon=True, after=[first])
    assert graph.assign(0) is long
    assert graph.assign(1) is first
    assert graph.assign(2) is None, "what it is made from is not there"
    graph.settle(first, 1, HiddenRecord(outputs=(), timing=Timing()))
    assert graph.assign(1) is behind


def test_a_single_worker_and_those_of_a_finished_job_read_nothing_early() -> None:
    for cluster in (
        Cluster(MemoryWorkspace(), count=3, workers=1, ahead=True),
        Cluster(finished(3), count=3, workers=2, ahead=True),
    ):
        cluster.run()
        assert cluster.halves("prefetch") == []


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
def test_hidden_states_that_vanish_while_the_job_runs_are_made_again(propagate: Mode) -> None:
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
    assert len(cluster.blocks.records) == 4


def test_the_embeddings_output_is_not_among_what_is_discarded() -> None:
    """Everything else follows from it, so another job on the same chain can always go on."""
    cluster = Cluster(MemoryWorkspace(), count=3, workers=1)
    cluster.run()
    assert Counter(cluster.blocks.discardable) == Counter(each for behind in boundaries(cluster) for each in behind)


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
    assert len(cluster.blocks.records) == 2


def test_an_embedding_whose_output_is_gone_is_made_again_when_a_block_reads_it() -> None:
    workspace = finished(2)
    forget_blocks(workspace, [0])
    for each in FIRST:
        workspace.discard(each)
    cluster = Cluster(workspace, count=2, workers=1)
    cluster.run()
    assert cluster.started == [("embed", -1, 0), ("forward", 0, 0), ("block", 0, 0)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_with_a_budget_every_block_is_calibrated_once_and_measured_where_its_statistics_are(workers: int) -> None:
    cluster = Cluster(MemoryWorkspace(), count=4, workers=workers, budget=True)
    cluster.run()
    assert cluster.halves("forward") == [0, 1, 2, 3]
    assert cluster.recalculated == []
    assert cluster.shared == 1
    first_compressed = min(place for place, (kind, _, _) in enumerate(cluster.started) if kind == "block")
    assert max(place for place, (kind, _, _) in enumerate(cluster.started) if kind == "gains") < first_compressed
    for kind in ("gains", "block"):
        places = {(index, worker) for name, index, worker in cluster.started if name == kind}
        assert places == {(index, worker) for name, index, worker in cluster.started if name == "forward"}


def test_gains_of_one_block_are_measured_while_the_next_is_calibrated() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=2, budget=True)
    cluster.assign()
    cluster.finish(0)
    cluster.assign()
    assert cluster.started[1:] == [("gains", 0, 0), ("forward", 1, 1)]


@pytest.mark.parametrize(("hold", "twice"), [(0, [0, 1, 2]), (1, [0, 1]), (2, [0]), (3, [])])
def test_blocks_beyond_the_bound_are_calibrated_a_second_time(hold: int, twice: list[int]) -> None:
    """One worker, four blocks of one byte each; beside the one that it works on it keeps `hold`."""
    cluster = Cluster(MemoryWorkspace(), count=4, workers=1, budget=True, hold=hold)
    cluster.run()
    assert cluster.halves("forward") == [0, 1, 2, 3]
    assert sorted(cluster.recalculated) == twice


def test_a_budget_with_compressed_propagation_measures_the_original_blocks_first() -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=1, propagate="compressed", budget=True)
    cluster.run()
    assert [kind for kind, _, _ in cluster.started] == ["forward", "gains"] * 3 + ["block"] * 3
    assert cluster.holds == {0: {}}
    assert {each.sha256 for each in cluster.blocks.discardable} == cluster.workspace.blobs - {
        *(each.sha256 for each in FIRST),
        *(blob("checkpoint", index).sha256 for index in range(3)),
    }


def test_a_resumed_job_with_a_budget_asks_for_no_gains_again() -> None:
    first = Cluster(MemoryWorkspace(), count=4, workers=1, budget=True)
    first.run()
    forget_blocks(first.workspace, [1])
    cluster = Cluster(first.workspace, count=4, workers=1, budget=True)
    assert [record.index for record in cluster.blocks.reused] == [0, 2, 3]
    cluster.run()
    assert cluster.started == [("forward", 1, 0), ("block", 1, 0)]


def test_what_nobody_reads_is_not_made_again() -> None:
    """The record of the last block's hidden states is gone; every block is done."""
    workspace = finished(3)
    (last,) = Cluster(workspace, count=3, workers=1).blocks.calibrate[2:]
    task = last.made()
    assert isinstance(task, Calibrate)
    del workspace.records[CALIBRATE, task.block.calibrate_key()]
    cluster = Cluster(workspace, count=3, workers=1)
    assert not cluster.blocks.calibrate[2].done
    assert cluster.graph.assign(0) is None


def test_what_a_dead_worker_held_anybody_can_compress() -> None:
    cluster = Cluster(MemoryWorkspace(), count=4, workers=2, budget=True)
    while not cluster.halves("block"):
        cluster.assign()
        if not cluster.halves("block"):
            cluster.finish(next(iter(cluster.running)))  # whoever has worked longest
    held = {worker: sorted(blocks) for worker, blocks in cluster.holds.items()}
    assert all(len(blocks) == 2 for blocks in held.values())
    cluster.finish(0, dies=True)
    cluster.finish(1)
    cluster.workers = range(1, 2)  # it has no successor
    cluster.run()
    assert sorted(cluster.recalculated) == held[0]


def test_gains_that_were_measured_elsewhere_leave_the_statistics_there() -> None:
    cluster = Cluster(MemoryWorkspace(), count=2, workers=2, budget=True)
    cluster.assign()
    cluster.finish(0)
    cluster.assign()
    cluster.finish(0, dies=True)  # in the gains of block 0
    cluster.finish(1)
    cluster.workers = range(1, 2)
    for _ in range(2):
        cluster.assign()
        cluster.finish(1)
    assert cluster.halves("gains") == [0, 1, 0]
    cluster.workers = range(2)  # the first has a successor, which holds nothing
    cluster.run()
    assert cluster.recalculated == [0]
    assert [worker for kind, _, worker in cluster.started if kind == "block"] == [1, 1]


class Vanishing(Cluster):
    """Two workers; block 0 is calibrated on the first, and block 1 has failed on the second because block 0's hidden states are
    gone. So block 0 is to be compressed where its statistics are, and to be calibrated again."""

    def __init__(self) -> None:
        super().__init__(MemoryWorkspace(), count=2, workers=2)
        self.assign()
        self.finish(0)
        chain = self.graph.assign(1)
        assert chain is not None
        assert chain.made().name == "block 1 (forward)"
        for each in boundaries(self)[0]:
            self.workspace.discard(each)
        self.graph.failed(chain)

    def given(self, worker: int) -> str | None:
        node = self.graph.assign(worker)
        return None if node is None else node.made().name


def test_a_block_is_not_calibrated_again_while_it_is_compressed() -> None:
    cluster = Vanishing()
    assert cluster.given(0) == "block 0 (block)"
    assert cluster.given(1) is None


def test_a_block_is_not_compressed_while_it_is_calibrated_again() -> None:
    cluster = Vanishing()
    assert cluster.given(1) == "block 0 (forward)"
    assert cluster.given(0) is None


def test_a_task_that_failed_because_another_job_has_finished_it_is_done() -> None:
    """What it reads is then gone from the store."""
    workspace = MemoryWorkspace()
    record = workspace.records.pop((EMBED.kind, EMBED.key()))
    graph = Graph(workspace)
    node: Node[HiddenRecord] = graph.add(lambda: EMBED)
    graph.open()
    assert graph.assign(0) is node
    workspace.records[EMBED.kind, EMBED.key()] = record
    graph.failed(node)
    assert node.done
    assert node.value == record
    assert graph.assign(0) is None


def test_hidden_states_that_were_discarded_are_made_again_only_for_those_who_read_them() -> None:
    workspace = MemoryWorkspace()
    graph = Graph(workspace)
    node: Node[HiddenRecord] = graph.add(lambda: EMBED)
    graph.open()
    graph.discard([node])
    assert not workspace.blobs
    assert graph.assign(0) is None
    graph.add(lambda: EMBED.model_copy(update={"tokens": blob("other")}), reads=[node])
    assert graph.assign(0) is node


def test_a_value_that_is_not_there_yet_is_an_error() -> None:
    graph = Graph()
    node = graph.add(lambda: EMBED)
    with pytest.raises(ValueError, match=r"^node 0: has no value yet"):
        _ = node.value
    with pytest.raises(ValueError, match=r"^workspace: none"):
        graph.open()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_happens_in_whatever_order_the_chain_ends(data: st.DataObject) -> None:
    """Workers finish in any order, die, fail, and hidden states vanish: while there are fewer faults than patience,
    every block is solved, no half runs without its inputs, and nothing hangs."""
    propagate: Mode = data.draw(st.sampled_from(["original", "compressed"]))
    budget, hold = data.draw(st.booleans()), data.draw(st.integers(0, 3))
    count = data.draw(st.integers(1, 6))
    workers = data.draw(st.sampled_from([1, 2, 3, 5]))
    workspace = MemoryWorkspace()
    if data.draw(st.booleans()):
        workspace = finished(count, propagate)
        forget_blocks(workspace, data.draw(st.sets(st.integers(0, count - 1))))
    cluster = Cluster(workspace, count=count, workers=workers, propagate=propagate)
    hidden = [each for behind in boundaries(cluster) for each in behind]
    hidden += FIRST if data.draw(st.booleans()) else ()
    parts = balanced(UNITS, workers)
    hidden += [blob("part", index, linears) for index in range(count) for linears in parts]
    for each in data.draw(st.sets(st.sampled_from(hidden))):
        workspace.discard(each)
    stretch = data.draw(st.integers(1, len(FIRST)))
    segment = data.draw(st.sampled_from([None, 1, 2, 3])) if propagate == "compressed" else None
    cluster = Cluster(
        workspace,
        count=count,
        workers=workers,
        propagate=propagate,
        budget=budget,
        hold=hold,
        stretch=stretch,
        segment=segment,
        every=data.draw(st.sampled_from([None, 0, 1, 2, 3])),
        shared=data.draw(st.booleans()),
    )
    cluster.faulty = True
    faults = data.draw(st.integers(0, 6))
    for _ in range(80 * (count + 1)):
        if cluster.done:
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
    assert cluster.done
    assert [record.index for record in cluster.blocks.records] == list(range(count))
    if not cluster.running:
        assert cluster.graph.assign(0) is None
        assert not any(cluster.memory.values()), "kept in memory, and nobody reads it"


@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_a_worker_that_dies_while_it_is_idle_takes_its_hidden_states_with_it(propagate: Mode) -> None:
    """They are made again at once, from the last that were written."""
    cluster = Cluster(MemoryWorkspace(), count=5, workers=1, propagate=propagate, every=2)
    while len(cluster.blocks.reused) + sum(node.done for node in cluster.blocks.compress) < 3:
        cluster.assign()
        cluster.finish(0)
    before = len(cluster.started)
    cluster.memory[0] = set()
    cluster.graph.lost(0)
    cluster.run()
    again = [index for _, index, _ in cluster.started[before:]]
    assert again == [2, 3, 3, 4, 4] if propagate == "original" else [2, 3, 4]
    assert cluster.recalculated == []


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_share_a_block_and_nobody_waits_until_it_is_put_together(workers: int) -> None:
    cluster = Cluster(MemoryWorkspace(), count=3, workers=workers, propagate="compressed", shared=True)
    cluster.run()
    parts, stretches = min(workers, len(UNITS)), min(workers, len(FIRST))
    assert cluster.halves("solve") == sorted([0, 1, 2] * parts)
    assert cluster.halves("propagate") == sorted([0, 1, 2] * stretches)
    assert cluster.halves("block") == [0, 1, 2]
    kinds = [(kind, index) for kind, index, _ in cluster.started]
    assert kinds.index(("block", 0)) > kinds.index(("solve", 1))
    for kind in ("solve", "propagate"):
        together = {worker for own, index, worker in cluster.started if (own, index) == (kind, 1)}
        assert len(together) > 1
    assert [record.outputs for record in cluster.blocks.records] == boundaries(cluster)


@pytest.mark.parametrize("before", [1, 3])
def test_shared_blocks_are_found_however_they_were_divided(before: int) -> None:
    """Two finished blocks, without anything that lay beside them; the third alone is solved."""
    first = Cluster(MemoryWorkspace(), count=3, workers=before, propagate="compressed", shared=before > 1)
    first.run()
    forget_blocks(first.workspace, {2})
    first.workspace.records = {key: record for key, record in first.workspace.records.items() if key[0] != "solve"}
    cluster = Cluster(first.workspace, count=3, workers=2, propagate="compressed", shared=True)
    cluster.run()
    assert [record.index for record in cluster.blocks.reused] == [0, 1]
    assert cluster.halves("solve") == [2, 2]
    alone = Cluster(cluster.workspace, count=3, workers=1, propagate="compressed")
    assert [record.index for record in alone.blocks.reused] == [0, 1, 2]


def test_a_resumed_job_goes_on_with_parts_that_were_solved() -> None:
    """Those whose blobs are there; a death takes nothing else."""
    workspace = MemoryWorkspace()
    cluster = Cluster(workspace, count=2, workers=3, propagate="compressed", shared=True)
    cluster.assign()
    for worker in (0, 1):
        cluster.finish(worker)
    cluster.finish(2, dies=True)
    gone = cluster.blocks.shared[1].hidden_states
    assert gone
    workspace.discard(*gone)
    again = Cluster(workspace, count=2, workers=3, propagate="compressed", shared=True)
    again.run()
    assert again.halves("solve") == [0, 0, 1, 1, 1]


def test_shards_and_linears_are_divided_evenly() -> None:
    assert in_stretches(129, 8) == [range(129 * place // 8, 129 * (place + 1) // 8) for place in range(8)]
    assert in_stretches(2, 8) == [range(1), range(1, 2)]
    assert [len(stretch) for stretch in in_stretches(10, 3)] == [3, 3, 4]
    assert balanced(UNITS, 2) == [("a",), ("c", "b")]
    assert balanced(UNITS, 8) == [("a",), ("c",), ("b",)]
    assert balanced((), 8) == []


def test_a_block_that_is_put_together_forgets_no_hidden_states_of_those_who_made_them() -> None:
    """Its record names them; the parts of the next block read them from the memory of who ran it."""
    cluster = Cluster(MemoryWorkspace(), count=3, workers=2, propagate="compressed", shared=True, every=0)
    cluster.run()
    assert cluster.halves("propagate") == [0, 0, 1, 1, 2, 2], "none is made twice"
    assert cluster.recalculated == []
    assert not any(cluster.memory.values())
