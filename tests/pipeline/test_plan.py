from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from counterweight.pipeline import devices, memory, plan
from counterweight.pipeline.memory import PROCESS_BYTES
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.plan import BlockPlan, make_plan
from counterweight.pipeline.resolve import block_recipe
from counterweight.workers.calibrated_block import calibrated
from counterweight.workers.checkpoint.header import LENGTH_BYTES
from counterweight.workers.errors import ManifestError, RequestError
from counterweight.workers.methods.weights import Weights
from counterweight.workers.worker import Worker
from tests.models import checkpoint, read_tensors, token_ids
from tests.pipeline.tiny import job_of, local_path, run_local, write_job
from tests.workers.checkpoint.builders import RecordingStore
from tests.workers.specs import Site

LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def source(manifest: Path) -> ModelSource:
    return open_model((manifest.parent / "model").as_uri())


def test_the_plan_counts_what_is_there(manifest: Path, source: ModelSource) -> None:
    plan = make_plan(job_of(manifest), source)
    tensors = read_tensors(manifest.parent / "model")
    assert plan.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert plan.source_bytes == sum(tensor.numel() * 2 for tensor in tensors.values())
    assert plan.quantized == 2 * sum(map(prod, LINEARS.values()))
    assert plan.tokens == 12 * 32
    assert [block.index for block in plan.blocks] == [0, 1]
    for block in plan.blocks:
        prefix = f"model.layers.{block.index}."
        assert {name.removeprefix(prefix): shape for name, shape in block.linears.items()} == LINEARS
        assert block.source_bytes == sum(t.numel() * 2 for name, t in tensors.items() if name.startswith(prefix))
        assert block.parameters * 2 == block.source_bytes
    assert plan.problems == ()


def test_a_pass_is_two_operations_a_weight_a_token_and_the_gram_matrices(manifest: Path, source: ModelSource) -> None:
    plan = make_plan(job_of(manifest), source)
    block = plan.blocks[0]
    # 12 sequences of 32 tokens, and one that is held out, of which there are no statistics; scores of heads that are 64 wide
    # together, and the values that they mix.
    assert block.forward_flops == 2 * 416 * sum(map(prod, LINEARS.values())) + 4 * 416 * 32 * 64
    # One matrix per distinct input: q/k/v, o, gate/up (width 64) and down (width 96), each within one strip of its triangle.
    # What a shard gives of it is added in float64: 16 bytes an entry, counted in operations of 12.
    entries = 3 * 64**2 + 96**2
    assert block.statistics_flops == 2 * 384 * entries + entries / 2 * 16 / 12
    assert block.statistics_bytes == (3 * 64**2 + 96**2) * 8  # no more than one strip each
    assert block.solve_flops > 0
    assert block.prepare_flops == block.tune_flops == 0
    assert block.flops == sum(block.phases.values()) == block.forward_flops + block.statistics_flops + block.solve_flops
    assert plan.flops == sum(each.flops for each in plan.blocks)


def test_experts_see_their_share_of_the_tokens(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, case="mixtral", layers=1)
    block = make_plan(job_of(manifest), open_model((tmp_path / "model").as_uri())).blocks[0]
    attention = 64 * 64 * 2 + 32 * 64 * 2
    one_expert = 3 * 64 * 96
    assert block.forward_flops == 2 * 416 * (attention + 4 * one_expert * 2 // 4) + 4 * 416 * 32 * 64


def test_what_is_kept_is_not_in_a_blocks_recipe(manifest: Path, source: ModelSource) -> None:
    job = job_of(
        manifest,
        "spec.recipe.keep=[lm_head, '*.o_proj', 'model.layers.1.mlp.*']",
        "spec.recipe.overrides=[{match: '*.0.mlp.down_proj', weights: {bits: 8}}]",
    )
    first, second = (block_recipe(source, index, job.spec.recipe) for index in (0, 1))
    assert set(first) == set(LINEARS) - {"self_attn.o_proj"}
    assert set(second) == {f"self_attn.{letter}_proj" for letter in "qkv"}
    assert first["mlp.down_proj"].weights == Weights(bits=8)
    assert first["mlp.up_proj"].weights.bits == 4
    plan = make_plan(job, source)
    assert plan.quantized == sum(map(prod, LINEARS.values())) - 64 * 64 + 128 * 64


def test_longer_sequences_and_more_workers_need_more_memory(manifest: Path, source: ModelSource) -> None:
    plan = make_plan(job_of(manifest), source)
    longer = make_plan(job_of(manifest, "spec.calibration.sequence_length=65536"), source)
    assert longer.peak_bytes_per_worker > plan.peak_bytes_per_worker > PROCESS_BYTES
    assert longer.blocks[0].activation_bytes > plan.blocks[0].activation_bytes
    crowd = make_plan(job_of(manifest, "spec.resources.workers=5000"), source)
    assert len(crowd.problems) == 1
    assert crowd.problems[0].startswith("5000 workers of ")
    # GPUs have memory of their own, which headers do not tell.
    gpus = job_of(manifest, "spec.resources={workers: 5000, gpus_per_worker: 1}")
    assert make_plan(gpus, source).problems == ()


def test_a_scaled_block_lies_beside_what_it_was_while_shards_stream(manifest: Path, source: ModelSource) -> None:
    """With several workers shards come a few at a time, and each needs the original block's output."""

    def forward(workers: int, *overrides: str) -> BlockPlan:
        resources = (f"spec.resources.workers={workers}", "spec.resources.cpus_per_worker=1")
        job = job_of(manifest, "spec.calibration.sequence_length=4096", *resources, *overrides)
        return make_plan(job, source).blocks[0]

    smoothing = "spec.recipe.transforms=[{kind: smoothing}]"
    assert forward(2).peak_bytes == forward(1).peak_bytes
    one, two = forward(1, smoothing), forward(2, smoothing)
    assert one.peak_phase == two.peak_phase == "forward"
    assert two.peak_bytes - one.peak_bytes == 4 * one.parameters


def test_what_does_not_fit_a_gpu_is_told_with_its_block(
    manifest: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(manifest, "spec.resources={workers: 8, gpus_per_worker: 1}")
    assert make_plan(job, source, "L4-24G").problems == ()
    peak = make_plan(job, source).blocks[0].peak_bytes
    monkeypatch.setattr(devices, "MEMORY", {"tiny": peak // 2})
    divided = make_plan(job, source, "tiny")
    (problem,) = divided.problems
    assert len(divided.blocks[0].passes) > 1
    assert problem.startswith(f"block 0 in {len(divided.blocks[0].passes)} passes over the tokens needs ")
    assert problem.endswith(" of tiny")
    monkeypatch.setattr(devices, "MEMORY", {"tiny": 2 * peak})
    assert make_plan(job, source, "tiny").divided == make_plan(job, source, "tiny").problems == ()
    shared = job_of(manifest, "spec.resources={workers: 8, gpus_per_worker: 0.5}")
    assert make_plan(shared, source, "tiny").divided
    with pytest.raises(RequestError, match="--device: 'H1000': expected one of tiny"):
        make_plan(job, source, "H1000")


BUDGET = "spec.recipe.compensation.rank={budget_bits: 2.0}"


@pytest.mark.parametrize("activations", ["null", "{bits: 8}"])
def test_what_calibration_leaves_in_memory_is_what_is_planned(
    manifest: Path, source: ModelSource, tmp_path: Path, activations: str
) -> None:
    job = job_of(manifest, f"spec.recipe.activations={activations}")
    site = Site(source=manifest.parent / "model", work=tmp_path, compute_dtype=job.spec.calibration.compute_dtype)
    worker = Worker("cpu")
    inputs = worker.run(site.embed(token_ids(2, 16))).outputs
    spec = site.block(0, inputs).model_copy(update={"recipe": block_recipe(source, 0, job.spec.recipe)})
    held = calibrated(worker.context, spec, site.workspace)
    worker.close()
    assert make_plan(job, source).blocks[0].calibrated_bytes == pytest.approx(held.bytes, rel=0.01)


def test_a_budget_keeps_statistics_of_several_blocks_within_a_bound(
    manifest: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sharing = make_plan(job_of(manifest), source), make_plan(job_of(manifest, BUDGET), source)
    held = sum(block.calibrated_bytes for block in sharing.blocks)
    assert sharing.peak_bytes_per_worker == plain.peak_bytes_per_worker + held
    compressed = make_plan(job_of(manifest, BUDGET, "spec.calibration.propagate=compressed"), source)
    ranked = make_plan(job_of(manifest, "spec.calibration.propagate=compressed"), source)
    assert compressed.peak_bytes_per_worker == pytest.approx(ranked.peak_bytes_per_worker, abs=held / 5)
    monkeypatch.setattr(plan, "HOLD_BYTES", held - 1)
    assert make_plan(job_of(manifest, BUDGET), source).peak_bytes_per_worker == sharing.peak_bytes_per_worker - 1
    # A GPU that has just what a job without a budget needs.
    monkeypatch.setattr(memory, "memory_of", lambda name: sharing.blocks[0].peak_bytes)
    assert make_plan(job_of(manifest, BUDGET), source, "tiny").problems
    assert not make_plan(job_of(manifest), source, "tiny").problems


def test_segments_cost_a_pass_of_the_original_through_the_blocks_before_the_last(tmp_path: Path) -> None:
    """Its arithmetic, its weights, what enters and what leaves it; of budgets it is calibrated anyhow."""
    manifest = write_job(tmp_path, layers=3)
    source = open_model((tmp_path / "model").as_uri())

    def planned(*overrides: str) -> plan.Plan:
        through_the_store = "spec.resources.hidden_states.memory=0MiB"
        return make_plan(
            job_of(manifest, "spec.calibration.propagate=compressed", through_the_store, *overrides), source
        )

    one, two = planned(), planned("spec.calibration.segment_blocks=2")
    before, behind = two.blocks[:2], two.blocks[2:]
    assert [block.forward_flops for block in behind] == [block.forward_flops for block in one.blocks[2:]]
    passes = [new.forward_flops - old.forward_flops for new, old in zip(before, one.blocks, strict=False)]
    assert passes[0] == passes[1]
    assert 0.3 * one.blocks[0].forward_flops < passes[0] < 0.5 * one.blocks[0].forward_flops
    hidden = two.storage_written_bytes - one.storage_written_bytes
    assert hidden == 2 * (12 + 1) * 32 * source.layout.hidden_size * 4  # of all windows, one held out, in float32
    read = two.storage_read_bytes - one.storage_read_bytes
    assert read == hidden + sum(block.source_bytes for block in before)
    assert planned("spec.calibration.segment_blocks=3") == one
    original = make_plan(job_of(manifest, "spec.resources.hidden_states.memory=0MiB"), source)
    assert planned("spec.calibration.segment_blocks=1") == original
    sharing = [planned(BUDGET, f"spec.calibration.segment_blocks={blocks}").flops for blocks in (2, 3)]
    assert sharing[0] == sharing[1]


def test_all_that_the_recipe_asks_in_vain_is_listed(manifest: Path, source: ModelSource) -> None:
    with pytest.raises(ManifestError) as caught:
        make_plan(job_of(manifest, "spec.recipe.weights.group_size=128"), source)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(LINEARS)
    assert (
        "spec.recipe.weights.group_size: 128: expected a divisor of 96, the width of model.layers.0.mlp.down_proj"
        in lines
    )
    overrides = "spec.recipe.overrides=[{match: 'a*', weights: {bits: 8}}, {match: '*.up_proj', weights: {bits: 8}}]"
    with pytest.raises(ManifestError) as caught:
        make_plan(job_of(manifest, overrides, "spec.recipe.keep=[lm_head, b]"), source)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "spec.recipe.overrides.0.match",
        "spec.recipe.keep.1",
    ]


def test_the_plans_storage_traffic_is_near_what_a_job_writes(
    manifest: Path, tmp_path: Path, source: ModelSource
) -> None:
    settings = ("spec.recipe.compensation={kind: none}", "spec.validation.windows=4")
    job = job_of(manifest, f"spec.output.uri={tmp_path}", *settings)
    plan = make_plan(job, source)
    published = run_local(job)
    shards = sum(path.stat().st_size for path in local_path(published.uri).glob("*.safetensors"))
    blobs = sum(path.stat().st_size for path in (tmp_path / "_work" / "blobs").iterdir())
    # The embedding's output is among the blobs; what leaves a block waits in the memory of a job's only worker.
    assert plan.storage_written_bytes == pytest.approx(shards + blobs, rel=0.1)


class StrictStore(RecordingStore):
    """Notes ranges, and lets nobody read a file of weights as a whole."""

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        assert not key.endswith(".safetensors")
        return super().read(key, sha256=sha256)


def test_a_plan_reads_headers_and_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_job(tmp_path)
    checkpoint("llama", tmp_path / "model", torch.bfloat16, intermediate_size=20_000)
    weights = tmp_path / "model" / "model.safetensors"
    size = weights.stat().st_size
    assert size > 10 << 20
    store = StrictStore(tmp_path / "model")
    monkeypatch.setattr("counterweight.pipeline.model_source.open_store", lambda uri: store)
    plan = make_plan(job_of(manifest), open_model((tmp_path / "model").as_uri()))
    header = LENGTH_BYTES + int.from_bytes(weights.open("rb").read(LENGTH_BYTES), "little")
    in_weights = [(start, length) for key, start, length in store.ranges if key == weights.name]
    assert in_weights
    assert all(start + length <= header for start, length in in_weights)
    assert plan.header_bytes_read == sum(length for _, _, length in store.ranges)
    assert plan.header_bytes_read < size / 1000
    assert plan.source_bytes == pytest.approx(size, rel=0.01)


def test_the_same_names_under_another_model_are_another_plan(manifest: Path, source: ModelSource) -> None:
    """Nothing is remembered between plans."""
    first = make_plan(job_of(manifest), source)
    again = make_plan(job_of(manifest), replace(source))
    assert first == again


def test_a_latency_budget_is_resolved_into_channels(tmp_path: Path) -> None:
    budget = "{slowdown: 0.1, device: {dram: 100, pcie: 50, multiprocessors: 20}}"
    job = job_of(write_job(tmp_path, layers=1), f"spec.recipe.residual.channels_per_chunk={budget}")
    block = make_plan(job, open_model((tmp_path / "model").as_uri())).blocks[0]
    numbers = {name: part.residual.per_chunk for name, part in block.recipe.items() if part.residual is not None}
    assert set(numbers) == set(LINEARS)
    assert all(number > 1 for number in numbers.values())
