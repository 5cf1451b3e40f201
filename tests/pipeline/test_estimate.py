"""Seconds of a job on simulated workers, against schedules that are worked out here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import pytest

from counterweight.pipeline.blocks import EDGE, BlockNodes, stretches
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.estimate import BlockSeconds, Estimate, again, validation_bytes
from counterweight.pipeline.estimate.costs import STREAMED, Passing
from counterweight.pipeline.estimate.pool import Simulated, SimulatedPool
from counterweight.pipeline.estimate.sharing import SharedSeconds, Steps
from counterweight.pipeline.graph import Graph
from counterweight.pipeline.hidden_states import away
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.plan import Plan, make_plan
from counterweight.pipeline.policies import RetryPolicy
from counterweight.pipeline.rates import COPIED, HASH, STORAGE, Rates, rates_of
from counterweight.pipeline.rates import GPUS as KNOWN
from counterweight.pipeline.shared_blocks import last_parts
from counterweight.workers.arithmetic.units import Unit
from counterweight.workers.errors import RequestError
from counterweight.workers.matrix_flops import Work
from counterweight.workers.parallel import READERS
from counterweight.workers.tasks.block import BlockSpec
from tests.pipeline.tiny import job_of, write_job

SHARDS = 12
LOAD, SHARD, SOLVE = 3.0, 0.5, 8.0
"""Seconds: of a block before its first shard, of each shard, and behind the last."""

BLOCK = BlockSeconds(
    steps={
        "read": LOAD,
        "rotate": 0.0,
        "prepare": 0.0,
        "hidden states": 0.2 * SHARDS,
        "forward": 0.2 * SHARDS,
        "statistics": (SHARD - 0.4) * SHARDS,
        "tune": 0.0,
        "solve": SOLVE - 1,
        "write": 1.0,
    },
    shards=SHARDS,
    stored=0,
    branch=0,
    evaluated=0.0,
    read_back=0.0,
    passed={"hidden states": 0.1 * SHARDS, "forward": 0.2 * SHARDS, "statistics": 0.0},
)


def simulated(
    count: int,
    workers: int,
    propagate: Literal["original", "compressed"] = "original",
    *,
    block: BlockSeconds = BLOCK,
    parts: Sequence[range] = (),
    segment: int | None = None,
    ahead: bool = False,
    shared: SharedSeconds | None = None,
) -> float:
    """Seconds of so many blocks, by the dispatcher and the graph of a job."""
    seconds = () if shared is None else [shared] * count
    pool = SimulatedPool(workers, 1, [block] * count, 0.0, [0] * count, ahead=ahead, shared=seconds)
    dispatcher = Dispatcher(pool, RetryPolicy(), lambda _: None, Graph())

    def spec_of(index: int, recipe: object, inputs: object, originals: object, propagate: str) -> BlockSpec:
        return BlockSpec.model_construct(
            index=index, recipe=recipe, inputs=inputs, original_inputs=originals, propagate=propagate
        )

    nodes = BlockNodes(
        graph=dispatcher.graph,
        recipes=[{}] * count,
        spec_of=spec_of,
        propagate=propagate,
        stretches=parts or stretches(SHARDS, count, workers, 1),
        segment=segment,
        workers=workers,
        ahead=ahead,
        units=() if shared is None else [UNITS] * count,
    )
    blocks = nodes.add([dispatcher.graph.add(lambda: Simulated("embedding", {}, block.shards))])
    dispatcher.run(blocks.compress)
    if block is BLOCK and not ahead and segment is None and shared is None:
        assert sum(pool.steps.values()) == pytest.approx(count * (LOAD + SHARDS * SHARD + SOLVE))
    return pool.clock


def streamed(count: int, workers: int) -> float:
    """The same by a recurrence: a block's owner is the worker that is free first; a shard enters when it has left the block
    before and the owner is done with the shard before it."""
    free, left = [0.0] * workers, [0.0] * SHARDS
    for _ in range(count):
        owner = min(range(workers), key=lambda worker: free[worker])
        now = max(free[owner], left[0]) + LOAD
        for shard in range(SHARDS):
            now = max(now, left[shard]) + SHARD
            left[shard] = now
        free[owner] = now + SOLVE
    return max(free)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_blocks_take_as_long_as_the_schedule_says(workers: int) -> None:
    assert simulated(16, workers) == pytest.approx(streamed(16, workers), rel=0.01)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_is_read_ahead_is_waited_for_in_the_first_block_alone(workers: int) -> None:
    """Where solving takes longer than reading, and blocks are of one owner after the other: a worker reads its first while it
    waits for what enters it, and each further one while the one before is solved."""
    assert LOAD < SOLVE
    waited = simulated(16, workers) - simulated(16, workers, ahead=True)
    assert waited == pytest.approx((16 // workers - 1 + workers - 1) * LOAD, rel=0.1)
    assert simulated(4, 1) - simulated(4, 1, "compressed", ahead=True) == pytest.approx(3 * LOAD)


@pytest.mark.parametrize("workers", [2, 8])
def test_stretches_of_a_gpu_are_about_as_long_as_is_best(workers: int) -> None:
    """Of lengths of all sizes, by simulation; what nothing hides is as long as `EDGE` shards."""
    shards, blocks = 128, 4 * workers
    steps = {name: seconds * shards / SHARDS if name in STREAMED else seconds for name, seconds in BLOCK.steps.items()}
    block = replace(BLOCK, steps=steps, shards=shards, edge=EDGE * SHARD)

    def seconds(length: int) -> float:
        parts = [range(shards)[start : start + length] for start in range(0, shards, length)]
        return simulated(blocks, workers, block=block, parts=parts)

    chosen = len(stretches(shards, blocks, workers, 1, gpu=True)[0])
    best = min(map(seconds, (8, 16, 24, 32, 48, 64)))
    assert seconds(chosen) <= 1.03 * best
    assert seconds(2) > 1.3 * best, "a few shards would do as well"
    assert seconds(shards) > 1.3 * best, "blocks one after the other would do as well"


def test_a_death_costs_passes_without_statistics_and_a_block() -> None:
    """The dearest: of blocks behind which hidden states are written, one is among two."""
    written = replace(BLOCK, passed={**BLOCK.passed, "hidden states": 0.2 * SHARDS})
    whole, passed = LOAD + SHARDS * SHARD + SOLVE, LOAD + SHARDS * 0.3
    assert again([BLOCK, BLOCK, written], 0) == pytest.approx(whole)
    assert again([BLOCK, BLOCK, written], 2) == pytest.approx(whole + 2 * passed + 0.1 * SHARDS)


def test_compressed_blocks_come_one_after_the_other() -> None:
    assert simulated(4, 3, "compressed") == pytest.approx(simulated(4, 1, "compressed"))


UNITS = [Unit(linears=(name,), flops=flops) for name, flops in (("down", 6), ("up", 3), ("o", 2), ("qkv", 1))]


class Even(SharedSeconds):
    """A second for each operation that a unit is counted as; a tenth for a shard that is run over, or read by a part; what is
    installed and put together takes 0.4 and 0.6."""

    def solve(self, linears: tuple[str, ...]) -> Steps:
        flops = sum(unit.flops for unit in UNITS if set(unit.linears) <= set(linears))
        return {"hidden states": 0.1 * SHARDS, "solve": float(flops), "write": 0.0}

    def install(self) -> Steps:
        return {"read": 0.4}

    def propagate(self, shards: int) -> Steps:
        return {"forward": 0.1 * shards}

    def compress(self) -> Steps:
        return {"write": 0.6}


def even() -> Even:
    return Even.__new__(Even)


@pytest.mark.parametrize("workers", [2, 3, 4, 6])
def test_workers_share_blocks_of_compressed(workers: int) -> None:
    """They wait for the largest part, and for the worker with the most shards. Putting a block together holds somebody up where
    all parts of the next one are as long, and at the end. Those without a part load the block for their shards."""
    read, longest, install = 0.1 * SHARDS, 6, 0.4
    each = LOAD + read + longest + install + 0.1 * SHARDS / workers + (LOAD if workers > len(UNITS) else 0)
    joining = 5 * 0.6 if workers == 2 else 0.6
    assert simulated(5, workers, "compressed", shared=even()) == pytest.approx(5 * each + joining)


def test_half_of_the_workers_share_the_last_block_where_blocks_are_calibrated_apart() -> None:
    """Of 17 on 4 workers it would be one worker's alone: two of them are free before the last two. What takes more than
    half of a block is one worker's anyhow."""
    together = simulated(17, 4, shared=even())
    free = simulated(16, 4) - 2 * (LOAD + SHARD)
    assert together == pytest.approx(free + LOAD + 0.1 * SHARDS + 6 + 0.6)
    assert together < simulated(17, 4) - 2
    assert simulated(17, 2, shared=even()) == simulated(17, 2), "half of two is one"
    assert last_parts(UNITS, 4) == [("down",), ("up", "o", "qkv")]
    assert not last_parts([Unit(linears=("down",), flops=7), *UNITS[1:]], 4)


def test_what_a_worker_of_a_shared_block_reads_ahead_is_not_waited_for() -> None:
    """Each reads the next block while it solves its part of this one."""
    waited = simulated(5, 2, "compressed", shared=even()) - simulated(5, 2, "compressed", shared=even(), ahead=True)
    assert waited == pytest.approx(4 * LOAD)


def test_segments_share_workers_that_are_more_than_they_are() -> None:
    beside = simulated(4, 4, "compressed", shared=even(), segment=2)
    assert beside < simulated(4, 2, "compressed", segment=2)
    assert simulated(4, 2, "compressed", shared=even(), segment=2) == simulated(4, 2, "compressed", segment=2)


def test_parts_of_a_block_sum_up_to_what_one_worker_computes(tmp_path: Path) -> None:
    """Statistics and solves; forward passes are run by each part, without the experts of others."""
    manifest = write_job(tmp_path, case="mixtral", layers=2)
    source = open_model((tmp_path / "model").as_uri())

    def planned(workers: int) -> Plan:
        calibration = "spec.calibration.propagate=compressed"
        return make_plan(job_of(manifest, GPUS, calibration, f"spec.resources.workers={workers}"), source, "H100-80G")

    alone, divided = planned(1), planned(4)
    assert alone.estimate is not None
    assert divided.estimate is not None
    for block in alone.blocks:
        assert len(block.units) == 4 + 2  # experts; what attention reads, and what its output does
        assert sum(unit.flops for unit in block.units) == pytest.approx(block.statistics_flops + block.solve_flops)
    one, several = alone.estimate.steps, divided.estimate.steps
    assert one["forward"] < several["forward"] < 4 * one["forward"]
    assert divided.storage_read_bytes > alone.storage_read_bytes + 3 * sum(b.source_bytes for b in alone.blocks)
    assert divided.storage_written_bytes > alone.storage_written_bytes


def test_segments_run_beside_each_other_and_cost_a_pass_through_the_blocks_before() -> None:
    whole, passed = LOAD + SHARDS * SHARD + SOLVE, LOAD + SHARDS * 0.3
    assert simulated(8, 1, "compressed", segment=4) == pytest.approx(8 * whole + 4 * passed)
    assert simulated(8, 1, "compressed", segment=8) == pytest.approx(8 * whole)
    # Two workers: one passes through four blocks with the other a block behind, or compresses; then each has a segment.
    beside = simulated(8, 2, "compressed", segment=4)
    assert 4 * whole + 2 * passed <= beside <= 4 * whole + 4 * passed


def test_stretches_are_as_short_as_the_pipeline_needs() -> None:
    assert stretches(128, 32, 1, 4) == [range(128)]
    assert {len(part) for part in stretches(128, 32, 8, 1)} == {1}
    assert {len(part) for part in stretches(128, 94, 8, 1)} == {2}
    assert [len(part) for part in stretches(9, 32, 2, 4)] == [4, 4, 1]
    assert [len(part) for part in stretches(9, 1, 2, 4, gpu=True)] == [4, 4, 1]
    assert stretches(128, 32, 1, 4, gpu=True) == [range(128)]
    for count, workers in ((94, 8), (61, 3), (80, 2)):
        parts = stretches(128, count, workers, 1)
        assert [shard for part in parts for shard in part] == list(range(128))
        waiting = (workers - 1) * len(parts[0])
        assert waiting <= max(0.01 * 128 * count / workers, workers - 1)


ONES = Rates(
    source="test",
    **dict.fromkeys(set(Rates.model_fields) - {"source", "link"}, 1.0),
    link=None,
)


@pytest.mark.parametrize("kind", ["products", "grams"])
def test_numbers_of_sixteen_bits_have_rates_of_their_own(kind: str) -> None:
    rates = ONES.model_copy(update={f"{kind}16": 4.0})
    work = Work(**{f"{kind}32": 12.0})
    assert (rates.seconds(work), rates.seconds(work, itemsize=2)) == (12.0, 3.0)


@pytest.mark.parametrize("kind", ["products64", "factorizations", "decompositions", "elementwise"])
def test_every_kind_of_work_has_its_rate(kind: str) -> None:
    work = Work(products32=1, grams32=1, products64=1, factorizations=1, decompositions=1, elementwise=1, steps=1)
    assert ONES.seconds(work) == 7
    assert ONES.model_copy(update={kind: 2.0}).seconds(work) == 6.5
    assert ONES.model_copy(update={"step": 3.0}).seconds(work) == 9


def test_bytes_are_moved_read_and_hashed_in_turn() -> None:
    rates = ONES.model_copy(update={"storage": 2.0, "hash": 4.0, "link": 8.0})
    assert (rates.received(8), rates.sent(8), rates.moved(8)) == (6, 6, 1)
    assert ONES.moved(8) == 0
    assert (ONES.checked(8), rates.checked(8)) == (16, 4)
    assert rates.model_copy(update={"hash": 1.0}).checked(8) == 8
    assert (ONES.read(8), rates.read(8)) == (16, 4), "a GPU's host verifies what has come while more comes"
    assert rates.model_copy(update={"hash": 0.25}).read(8) == 36 / READERS


def test_the_rates_of_a_gpu_that_was_measured_are_those_that_were() -> None:
    recorded = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-26-rates-h200.md"
    rows = [line.split("|")[1:-1] for line in recorded.read_text().splitlines() if line.startswith("|")]
    measured = {name.strip(): float(value) for name, value, *_ in rows[2:]}
    of_the_device = ["products16", "products32", "grams16", "grams32", "products64", "factorizations"]
    of_the_device += ["decompositions", "elementwise", "step"]
    for name in of_the_device:
        assert getattr(KNOWN["H200-141G"], name) == pytest.approx(measured[name], rel=0.01), name
    assert recorded.name in KNOWN["H200-141G"].source
    assert recorded.name in KNOWN["H100-80G"].source, "the same chip with less memory"
    assert recorded.name not in KNOWN["A100-80G"].source


def test_rates_come_by_name_or_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(ONES.model_dump_json())
    assert rates_of(str(path)) == ONES
    assert rates_of("H100-80G") == KNOWN["H100-80G"]
    assert rates_of("another") is None
    path.write_text('{"source": "nobody"}')
    with pytest.raises(RequestError, match=r"rates\.json: no rates: 'products16'"):
        rates_of(str(path))
    with pytest.raises(RequestError, match=r"missing\.json: No such file"):
        rates_of(str(tmp_path / "missing.json"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=3)


@pytest.fixture(scope="module")
def source(manifest: Path) -> ModelSource:
    return open_model((manifest.parent / "model").as_uri())


GPUS = "spec.resources={workers: 2, gpus_per_worker: 1}"


def found(manifest: Path, source: ModelSource, *overrides: str) -> Estimate:
    estimate = make_plan(job_of(manifest, *overrides), source, "H100-80G").estimate
    assert estimate is not None
    return estimate


def test_hidden_states_of_several_workers_are_copied_and_those_of_other_nodes_fetched() -> None:
    """Against the seconds of a thread that are worked out here."""
    rates, size = KNOWN["H100-80G"], 1e9
    moved, hashed = size / 50e9, size / HASH
    of_one, beside = Passing(size, 1.0, 0.0, None), Passing(size, 1.0, 0.0, 0.0)
    apart, spilled = Passing(size, 1.0, 0.0, 0.5), Passing(size, 0.75, 0.25, 0.0)
    assert of_one.reading(rates) == beside.reading(rates) == pytest.approx(moved)
    assert apart.reading(rates) - moved == apart.stored(rates, 1, 1) == pytest.approx(0.5 * size / STORAGE)
    assert of_one.writing(rates) == pytest.approx(hashed + moved)
    assert beside.writing(rates) == apart.writing(rates) == pytest.approx(hashed + moved + size / COPIED)
    assert spilled.reading(rates) == pytest.approx(moved + 0.25 * (size / STORAGE + hashed))
    assert spilled.writing(rates) == pytest.approx(hashed + moved + 0.75 * size / COPIED + 0.25 * size / STORAGE)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ("workers: 1", None),
        ("workers: 3", 0.0),
        ("workers: 8, gpus_per_worker: 1", 0.0),
        ("workers: 32, gpus_per_worker: 1", 0.75),
    ],
)
def test_hidden_states_lie_on_as_many_nodes_as_workers_need(
    manifest: Path, resources: str, expected: float | None
) -> None:
    assert away(job_of(manifest, f"spec.resources={{{resources}}}")) == expected


def test_what_workers_of_a_node_read_together_each_fetches_a_part_of_and_verifies_as_a_whole() -> None:
    rates, size = KNOWN["H100-80G"], 1e9
    fetching, verifying = size / STORAGE, size / HASH
    assert fetching / 2 > (fetching / 2 + verifying) / READERS, "two workers wait for storage still"
    for sharing in (1, 2):
        assert rates.read(size, sharing) == pytest.approx(fetching / sharing)
    assert rates.read(size, 8) == pytest.approx((fetching / 8 + verifying) / READERS)


def test_workers_work_or_wait(manifest: Path, source: ModelSource) -> None:
    estimate = found(manifest, source, GPUS)
    between = KNOWN["H100-80G"].task
    spent = sum(estimate.steps.values()) + sum(estimate.idle.values())
    assert spent == pytest.approx(estimate.workers * estimate.seconds)
    assert estimate.seconds == pytest.approx(sum(estimate.stages.values()))
    assert estimate.gpu_hours == pytest.approx(2 * estimate.seconds / 3600)
    assert estimate.seconds_of_one > estimate.seconds > KNOWN["H100-80G"].start + between
    assert 0.5 < estimate.efficiency < 1
    alone = found(manifest, source, "spec.resources={workers: 1, gpus_per_worker: 1}")
    assert estimate.seconds_of_one == alone.seconds, "of a job of one worker"
    start = KNOWN["H100-80G"].start
    assert estimate.efficiency_started * 2 * (estimate.seconds - start) == pytest.approx(
        estimate.seconds_of_one - start
    )
    assert any("after their start" in said for _, said in estimate.rows())


def test_a_plan_names_what_the_job_asks_for(manifest: Path, source: ModelSource) -> None:
    plain = found(manifest, source, GPUS, "spec.recipe.compensation={kind: none}")
    assert plain.steps["rotate"] == 0
    assert "join" not in plain.steps
    assert found(manifest, source, GPUS, "spec.recipe.transforms=[{kind: rotation}]").steps["rotate"] > 0
    branched = found(manifest, source, GPUS, "spec.recipe.compensation={kind: svd, rank: {count: 4}}")
    assert branched.steps["join"] > 0
    assert branched.steps["solve"] > plain.steps["solve"]
    alone = found(manifest, source, "spec.resources={workers: 1, gpus_per_worker: 1}")
    assert plain.steps["copy"] == pytest.approx(2 * plain.steps["check"] * HASH / STORAGE)
    assert plain.stages["assemble"] < 0.7 * alone.stages["assemble"], "files are copied side by side"
    without = found(manifest, source, GPUS, "spec.validation=null")
    assert "validate" not in without.stages
    assert found(manifest, source, "spec.resources={workers: 1, gpus_per_worker: 1}").efficiency == 1


def test_branches_are_joined_while_the_last_blocks_are_solved(manifest: Path, source: ModelSource) -> None:
    """Of three blocks the first's, where solving takes long and hashing too; codes lie behind all of their steps."""

    def estimated(further: str = "") -> Estimate:
        branch = f"spec.recipe.compensation={{kind: svd, rank: {{count: 4}}{further}}}"
        return found(manifest, source, GPUS, branch, "spec.validation=")

    slow = KNOWN["H100-80G"].model_copy(update={"hash": 1e5, "decompositions": 1e6})
    with patch.dict("counterweight.pipeline.rates.GPUS", {"H100-80G": slow}):
        begun, coded = estimated(), estimated(", factor_bits: 8")
        with patch("counterweight.pipeline.estimate.timeline.begun_behind", lambda *_: []):
            whole, coded_whole = estimated(), estimated(", factor_bits: 8")
    assert begun.steps["join"] == pytest.approx(whole.steps["join"])
    saved = whole.stages["assemble"] - begun.stages["assemble"]
    assert saved == pytest.approx(begun.steps["join"] / 3, rel=0.05)
    assert coded.stages["assemble"] == pytest.approx(coded_whole.stages["assemble"])


def test_gpus_read_the_original_once_for_few_windows_and_the_artifact_each(manifest: Path, source: ModelSource) -> None:
    text = "spec.validation={text: {uri: validation.txt}, sequence_length: 8192, windows: 4}"
    both = validation_bytes(job_of(manifest, GPUS, text), 1000, 10)
    assert both == 1000 + 2 * 10
    assert validation_bytes(job_of(manifest, text, "spec.resources.workers=2"), 1000, 10) == 2 * (1000 + 10)
    assert validation_bytes(job_of(manifest, GPUS, "spec.validation=null"), 1000, 10) == 0
    read = found(manifest, source, GPUS, text).steps["read for validation"]
    alone = found(manifest, source, "spec.resources={workers: 1, gpus_per_worker: 1}", text).steps[
        "read for validation"
    ]
    assert alone < read < 1.9 * alone


def test_nothing_is_said_without_rates(manifest: Path, source: ModelSource, tmp_path: Path) -> None:
    assert make_plan(job_of(manifest, GPUS), source).estimate is None
    assert make_plan(job_of(manifest), source, "H100-80G").estimate is None  # its workers have no GPU
    path = tmp_path / "rates.json"
    path.write_text(ONES.model_dump_json())
    assert make_plan(job_of(manifest, GPUS), source, str(path)).estimate is None
    measured = make_plan(job_of(manifest), source, str(path)).estimate
    assert measured is not None
    assert measured.gpu_hours == 0


def test_replicas_share_a_training(manifest: Path, source: ModelSource) -> None:
    """As many as there are workers take their share of the seconds; one more waits for its turn."""
    text = "{source: {uri: calibration.txt}, sequences: 12}"

    def seconds(workers: int, replicas: int) -> float:
        stage = f"spec.distillation={{texts: [{text}], held_out: [{text}], training: {{replicas: {replicas}}}}}"
        resources = f"spec.resources={{workers: {workers}, gpus_per_worker: 1}}"
        estimate = found(manifest, source, resources, stage, "spec.validation=")
        return estimate.stages["distill"] - KNOWN["H100-80G"].task * -(-replicas // workers)

    whole = seconds(1, 1)
    assert seconds(2, 1) == pytest.approx(whole)
    assert seconds(2, 2) == pytest.approx(whole / 2)
    assert seconds(1, 2) == pytest.approx(whole)
    assert seconds(2, 3) == pytest.approx(whole * 2 / 3)
