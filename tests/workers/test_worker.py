"""Tasks of a worker: bits that do not depend on who did what, results that are found again, an account without gaps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from counterweight.workers.block import CompressedLinear, install
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.config import Config
from counterweight.workers.context import TaskContext
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError
from counterweight.workers.interchange.compressed_tensors import read_weight
from counterweight.workers.interchange.peft import read_branch
from counterweight.workers.loaded_block import load_block
from counterweight.workers.models.block_builder import Block
from counterweight.workers.parallel import Overlapped
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.pass_through import PassThrough
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.tasks.task import Task
from counterweight.workers.tensor_blobs import get_tensors, put_tensors
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob
from tests.models import LM_HEAD, NORM, Case, build, checkpoint, save_fused, token_ids
from tests.workers.specs import RECIPE, Site

CPU = torch.device("cpu")
GPTQ = {**RECIPE, "weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}}}
LENGTH = 1024
SHARD = shard_sequences(LENGTH)  # sequences of one shard
MakeWorker = Callable[..., Worker]


@pytest.fixture
def make() -> Iterator[MakeWorker]:
    """Workers, closed when the test is over."""
    made: list[Worker] = []

    def worker(threads: int = 1) -> Worker:
        made.append(Worker("cpu", threads))
        return made[-1]

    yield worker
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    checkpoint("llama-tied-biased", directory, torch.bfloat16)
    return directory


@pytest.fixture
def site(llama: Path, tmp_path: Path) -> Site:
    return Site(source=llama, work=tmp_path / "work")


def embedded(worker: Worker, site: Site, *, sequences: int = 2, length: int = 16) -> tuple[Blob, ...]:
    return worker.run(site.embed(token_ids(sequences, length))).outputs


def calibration(spec: BlockSpec, start: int = 0, stop: int | None = None) -> Calibrate:
    """Of all shards, or of a stretch of them."""
    shards = len(spec.inputs)
    return Calibrate(block=spec, shards=shards, start=start, stop=shards if stop is None else stop)


def content(record: BlockRecord) -> dict[str, Any]:
    """Everything in a record that is not a time or a peak of memory."""
    dumped = record.model_dump(exclude={"timing": True, "modules": {"__all__": {"seconds"}}})
    assert dumped["modules"]
    return dumped


def run_compensated(site: Site, record: BlockRecord, hidden: Tensor, index: int) -> Tensor:
    """What the stored shard of block `index` makes of hidden states, put together by the formats of the record alone."""
    builder, stored = site.builder, get_tensors(site.workspace, record.checkpoint)
    factors = {} if record.adapter is None else get_tensors(site.workspace, record.adapter)
    linears: dict[str, CompressedLinear] = {}
    kept: dict[str, Tensor] = {}
    for parameter in builder.layout.block_parameters(index):
        name = builder.layout.disk_name(index, parameter)
        module = name.removesuffix(".weight")
        if module in record.formats and parameter.endswith(".weight"):
            form = record.formats[module]
            packed = {key: tensor for key, tensor in stored.items() if key.startswith(f"{module}.weight_")}
            weight = read_weight(packed, module, form)
            linears[parameter.removesuffix(".weight")] = CompressedLinear(
                weight=weight,
                low_rank=read_branch(factors, module, form, weight.shape),
                activations=form.activations,
            )
        else:
            kept[parameter] = stored[name]
    block: Block = builder.block(index, kept, CPU, torch.float32, absent=linears)
    install(block, linears)
    return block.run(hidden)


def test_it_says_what_it_computes_on(make: MakeWorker) -> None:
    assert make().ready() == "cpu"
    assert Worker("cuda").ready() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_inspection_finds_digests_and_numbers_that_are_none(site: Site, make: MakeWorker) -> None:
    found = make().run(Inspect(source=site.source.as_uri(), names=list(site.tensors)))
    assert {name: one.sha256 for name, one in found.items()} == site.digests
    assert all(one.finite for one in found.values())


def test_embedding_cuts_shards_of_a_fixed_number_of_tokens(site: Site, make: MakeWorker) -> None:
    ids = token_ids(SHARD + 2, LENGTH)
    outputs = make().run(site.embed(ids)).outputs
    hidden = [get_tensors(site.workspace, blob)["hidden"] for blob in outputs]
    assert [len(shard) for shard in hidden] == [SHARD, 2]
    assert SHARD > 2
    assert torch.equal(torch.cat(hidden), site.tensors["model.embed_tokens.weight"][ids].float())


@pytest.mark.parametrize("case", ["llama-tied-biased", "mixtral"])
@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_neither_threads_nor_overlapping_change_a_bit(
    case: str, propagate: Any, tmp_path: Path, make: MakeWorker
) -> None:
    """Overlapping: how a GPU's worker goes through shards, here on a CPU."""
    checkpoint(case, tmp_path / "model", torch.bfloat16)
    found: list[dict[str, Any]] = []
    for threads, overlapping in ((1, False), (2, False), (1, True)):
        site = Site(source=tmp_path / "model", work=tmp_path / f"work{threads}{overlapping}")
        worker = make(threads)
        if overlapping:
            worker.context.shards = Overlapped()
        inputs = embedded(worker, site, sequences=SHARD + 2, length=LENGTH)
        found.append(content(worker.run(Compress(block=site.block(0, inputs, GPTQ, propagate)))))
    assert found[0] == found[1] == found[2]


def test_two_halves_on_one_worker_are_the_whole_on_another(site: Site, make: MakeWorker, tmp_path: Path) -> None:
    worker = make()
    spec = site.block(0, embedded(worker, site))
    worker.run(calibration(spec))
    halves = worker.run(Compress(block=spec))
    elsewhere = Site(source=site.source, work=tmp_path / "elsewhere")
    fresh = make()
    whole = fresh.run(Compress(block=elsewhere.block(0, embedded(fresh, elsewhere))))
    assert content(halves) == content(whole)
    assert site.workspace.get_bytes(halves.checkpoint) == elsewhere.workspace.get_bytes(whole.checkpoint)
    assert halves.adapter is not None
    assert site.workspace.get_bytes(halves.adapter) == elsewhere.workspace.get_bytes(halves.adapter)


STRETCHES = {
    "gptq": GPTQ,
    "smoothed": {**GPTQ, "transforms": [{"kind": "smoothing"}], "activations": {"bits": 8}},
    "aser": {
        **GPTQ,
        "activations": {"bits": 8, "clip": "search"},
        "compensation": {"kind": "aser", "rank": {"count": 8}},
    },
}


@pytest.mark.parametrize("recipe", STRETCHES)
@pytest.mark.parametrize("lost", [False, True], ids=["held", "lost"])
def test_stretches_of_shards_are_the_whole(
    recipe: str, lost: bool, site: Site, make: MakeWorker, tmp_path: Path
) -> None:
    """One worker that calibrates shard by shard, or three that take over from each other with nothing in memory."""
    worker = make()
    spec = site.block(0, embedded(worker, site, sequences=3 * SHARD + 2, length=LENGTH), STRETCHES[recipe])
    tasks = [calibration(spec, 0, 1), calibration(spec, 1, 3), calibration(spec, 3, 4)]
    workers = [make() for _ in tasks] if lost else [worker] * len(tasks)
    parts = [own.run(task) for own, task in zip(workers, tasks, strict=True)]
    assert [len(part.outputs) for part in parts] == [1, 2, 1]
    streamed = workers[-1].run(Compress(block=spec))
    elsewhere = Site(source=site.source, work=tmp_path / "elsewhere")
    fresh = make()
    other = elsewhere.block(0, embedded(fresh, elsewhere, sequences=3 * SHARD + 2, length=LENGTH), STRETCHES[recipe])
    whole = fresh.run(calibration(other))
    assert whole.outputs == tuple(blob for part in parts for blob in part.outputs)
    assert content(streamed) == content(fresh.run(Compress(block=other)))
    found = [task.lookup(site.workspace) for task in tasks]
    assert [None if one is None else one.outputs for one in found] == [part.outputs for part in parts]


@pytest.mark.parametrize("start", [0, 1])
def test_outputs_that_are_gone_are_made_again_where_the_statistics_are_held(
    start: int, site: Site, make: MakeWorker
) -> None:
    """Another job that shares them was published meanwhile and has discarded them."""
    worker = make()
    spec = site.block(0, embedded(worker, site, sequences=SHARD + 2, length=LENGTH))
    if start:
        worker.run(calibration(spec, 0, 1))
    task = calibration(spec, start, 2)
    done = worker.run(task)
    assert worker.run(task).outputs == done.outputs
    for blob in done.outputs:
        site.workspace.discard(blob)
    assert worker.run(task).outputs == done.outputs
    assert all(map(site.workspace.has, done.outputs))


def test_a_block_that_is_calibrated_in_part_has_no_record(site: Site, make: MakeWorker) -> None:
    worker = make()
    spec = site.block(0, embedded(worker, site, sequences=SHARD + 2, length=LENGTH))
    worker.run(calibration(spec, 0, 1))
    assert calibration(spec).lookup(site.workspace) is None
    shards = Calibrate(block=spec.before(1), shards=2, stop=1)
    worker.run(calibration(spec, 1, 2))
    assert calibration(spec).lookup(site.workspace) is not None
    assert shards.lookup(site.workspace) is None, "its key is not known before all inputs are"


def test_forward_passes_on_what_the_original_block_makes(site: Site, make: MakeWorker) -> None:
    worker = make()
    inputs = embedded(worker, site)
    spec = site.block(0, inputs)
    outputs = worker.run(calibration(spec)).outputs
    block = load_block(worker.context, site.setting, 0, spec.tensors, torch.float32).block
    for before, after in zip(inputs, outputs, strict=True):
        hidden = get_tensors(site.workspace, before)["hidden"]
        assert torch.equal(get_tensors(site.workspace, after)["hidden"], block.run(hidden))


def test_finished_work_is_looked_up(site: Site, make: MakeWorker, tmp_path: Path) -> None:
    """Made sure by making it impossible to do again."""
    source = tmp_path / "source"
    shutil.copytree(site.source, source)
    site = Site(source=source, work=site.work)
    worker = make()
    ids = token_ids(2, 16)
    embed = site.embed(ids)
    spec = site.block(0, worker.run(embed).outputs)
    keep = PassThrough(setting=site.setting, tensors={NORM: site.digests[NORM]})
    done = worker.run(embed), worker.run(Compress(block=spec)), worker.run(keep)
    shutil.rmtree(source)
    fresh = make()
    assert (fresh.run(embed), fresh.run(Compress(block=spec)), fresh.run(keep)) == done
    site.workspace.discard(done[1].checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        fresh.run(Compress(block=spec))


def test_lost_bytes_are_made_again(site: Site, make: MakeWorker) -> None:
    worker = make()
    spec = site.block(0, embedded(worker, site))
    done = worker.run(Compress(block=spec))
    assert done.adapter is not None
    for blob in (done.checkpoint, done.adapter):
        site.workspace.discard(blob)
        assert content(worker.run(Compress(block=spec))) == content(done)
        assert site.workspace.has(blob)


def test_missing_inputs_are_an_error_that_a_retry_may_mend(site: Site, make: MakeWorker) -> None:
    worker = make()
    inputs = embedded(worker, site)
    site.workspace.discard(inputs[0])
    with pytest.raises(ObjectNotFoundError):
        worker.run(Compress(block=site.block(0, inputs)))


def test_a_source_that_changed_is_refused(site: Site, make: MakeWorker) -> None:
    worker = make()
    spec = site.block(0, embedded(worker, site))
    name = "model.layers.0.mlp.up_proj.weight"
    changed = spec.model_copy(update={"tensors": {**spec.tensors, name: "0" * 64}})
    with pytest.raises(CheckpointError, match="the source changed while the job ran"):
        worker.run(Compress(block=changed))
    less = {other: sha256 for other, sha256 in spec.tensors.items() if other != name}
    with pytest.raises(CheckpointError, match="no digest for"):
        worker.run(Compress(block=spec.model_copy(update={"tensors": less})))


def test_held_statistics_serve_only_the_task_they_were_gathered_for(site: Site, make: MakeWorker) -> None:
    """The first half of a task that keeps a linear gathers nothing for it; another task's second half needs it."""
    worker = make()
    inputs = embedded(worker, site)
    some = site.block(0, inputs, {**RECIPE, "keep": ["lm_head", "*.down_proj"]})
    assert len(some.recipe) == 6
    worker.run(calibration(some))
    record = worker.run(Compress(block=site.block(0, inputs)))
    assert len(record.formats) == 7


def test_compressed_propagation_hands_on_the_compensated_blocks_outputs(site: Site, make: MakeWorker) -> None:
    worker = make()
    inputs = embedded(worker, site, sequences=SHARD + 1, length=LENGTH)
    first = worker.run(Compress(block=site.block(0, inputs, propagate="compressed")))
    for before, after in zip(inputs, first.outputs, strict=True):
        hidden = get_tensors(site.workspace, before)["hidden"]
        expected = run_compensated(site, first, hidden, 0)
        assert torch.equal(get_tensors(site.workspace, after)["hidden"], expected)


def test_compressed_propagation_differs_from_block_one_on(site: Site, make: MakeWorker) -> None:
    worker = make()
    inputs = embedded(worker, site, sequences=SHARD + 1, length=LENGTH)
    specs = [site.block(0, inputs, GPTQ, propagate) for propagate in ("original", "compressed")]
    first_original, first_compressed = (worker.run(Compress(block=spec)) for spec in specs)
    assert first_original.tensors == first_compressed.tensors
    assert first_original.factors == first_compressed.factors
    assert first_original.outputs == ()
    passed_on = worker.run(calibration(specs[0])).outputs
    second_original = worker.run(Compress(block=site.block(1, passed_on, GPTQ)))
    second_compressed = worker.run(Compress(block=site.block(1, first_compressed.outputs, GPTQ, "compressed")))
    assert second_original.tensors.keys() == second_compressed.tensors.keys()
    assert second_original.tensors != second_compressed.tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["llama-tied-biased", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_what_is_kept_is_carried_over_bit_for_bit(
    case: str, dtype: torch.dtype, tmp_path: Path, make: MakeWorker
) -> None:
    """Whatever the blocks compute in."""
    checkpoint(case, tmp_path / "model", dtype)
    site = Site(source=tmp_path / "model", work=tmp_path / "work", compute_dtype="bfloat16")
    worker = make()
    recipe = {**RECIPE, "keep": ["lm_head", "*.o_proj"]}
    spec = site.block(0, embedded(worker, site), recipe)
    record = worker.run(Compress(block=spec))
    stored, source = get_tensors(site.workspace, record.checkpoint), site.tensors
    kept = [entry for entry in record.ledger if entry.fate == "kept"]
    assert any(entry.source.endswith("o_proj.weight") for entry in kept)
    assert any("norm" in entry.source for entry in kept)
    for entry in kept:
        (name,) = entry.stored_as
        assert stored[name].dtype is dtype
        assert torch.equal(stored[name], source[entry.source])
    outside = worker.run(PassThrough(setting=site.setting, tensors={NORM: site.digests[NORM]}))
    assert torch.equal(get_tensors(site.workspace, outside.checkpoint)[NORM], source[NORM])
    hidden = get_tensors(site.workspace, spec.inputs[0])["hidden"]
    assert hidden.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "case", ["llama-tied-biased", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3-full-queries"]
)
def test_the_ledger_covers_every_parameter(case: str, tmp_path: Path, make: MakeWorker) -> None:
    checkpoint(case, tmp_path / "model", torch.bfloat16)
    site = Site(source=tmp_path / "model", work=tmp_path / "work")
    worker = make()
    spec = site.block(0, embedded(worker, site), {**RECIPE, "compensation": {"kind": "none"}})
    assert_accounted(site, spec, worker.run(Compress(block=spec)))


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_the_ledger_covers_fused_experts(case: str, tmp_path: Path, make: MakeWorker) -> None:
    save_fused(build(case), tmp_path / "model")
    site = Site(source=tmp_path / "model", work=tmp_path / "work")
    worker = make()
    spec = site.block(0, embedded(worker, site), {**RECIPE, "compensation": {"kind": "none"}})
    record = worker.run(Compress(block=spec))
    assert_accounted(site, spec, record)
    of_gate_up = [entry for entry in record.ledger if entry.source.endswith("experts.gate_up_proj")]
    assert len(of_gate_up) == 8  # gate and up of four experts


def test_fused_experts_give_the_bits_of_separate_ones(tmp_path: Path, make: MakeWorker) -> None:
    model = build("mixtral")
    save_fused(model, tmp_path / "fused")
    checkpoint("mixtral", tmp_path / "apart")
    worker = make()
    records = []
    for name in ("fused", "apart"):
        site = Site(source=tmp_path / name, work=tmp_path / f"work-{name}")
        records.append(worker.run(Compress(block=site.block(0, embedded(worker, site)))))
    assert records[0].tensors == records[1].tensors
    assert records[0].factors == records[1].factors


def assert_accounted(site: Site, spec: BlockSpec, record: BlockRecord) -> None:
    """Every source tensor has a fate, every stored tensor a source, and their elements add up."""
    assert {entry.source for entry in record.ledger} == set(spec.tensors)
    stored = [name for entry in record.ledger for name in entry.stored_as]
    assert sorted(stored) == sorted(record.tensors)
    elements = sum(torch.Size(entry.shape).numel() for entry in record.ledger)
    assert elements == sum(site.tensors[name].numel() for name in spec.tensors)
    tensors = get_tensors(site.workspace, record.checkpoint)
    assert {name: tensor_digest(tensor) for name, tensor in tensors.items()} == record.tensors
    quantized = {entry.source for entry in record.ledger if entry.fate == "quantized"}
    assert quantized
    kept = [tensors[entry.stored_as[0]] for entry in record.ledger if entry.fate == "kept"]
    assert record.kept_bits == sum(tensor.numel() * tensor.element_size() * 8 for tensor in kept)
    assert len(record.formats) == len(record.modules) == len(spec.recipe)
    assert {module.name for module in record.modules} == set(record.formats)


def test_module_errors_are_those_of_the_stored_bytes(site: Site, make: MakeWorker) -> None:
    """From the blobs alone: ||(W - W') X||^2 / ||W X||^2 over the calibration tokens."""
    worker = make()
    inputs = embedded(worker, site, sequences=4, length=64)
    spec = site.block(0, inputs, GPTQ)
    record = worker.run(Compress(block=spec))
    loaded = load_block(worker.context, site.setting, 0, spec.tensors, torch.float32)
    block, parameters = loaded.block, loaded.parameters
    seen: dict[str, list[Tensor]] = {}
    for name in spec.recipe:
        block.linear(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0].flatten(0, 1).double())
        )
    for blob in inputs:
        block.run(get_tensors(site.workspace, blob)["hidden"])
    stored = get_tensors(site.workspace, record.checkpoint)
    assert record.adapter is not None
    factors = get_tensors(site.workspace, record.adapter)
    for module in record.modules:
        form = record.formats[module.name]
        local = module.name.removeprefix("model.layers.0.")
        x, weight = torch.cat(seen[local]), parameters[f"{local}.weight"].double()
        packed = {name: tensor for name, tensor in stored.items() if name.startswith(f"{module.name}.weight_")}
        quantized = read_weight(packed, module.name, form).dequantize(torch.float64)
        branch = read_branch(factors, module.name, form, (weight.shape[0], weight.shape[1]))
        assert branch is not None
        energy = (x @ weight.T).square().sum()
        left = weight - quantized
        assert module.error_quantized == pytest.approx(float((x @ left.T).square().sum() / energy), rel=1e-4)
        left = left - branch.product(torch.float64)
        assert module.error_compensated == pytest.approx(float((x @ left.T).square().sum() / energy), rel=1e-4)
        assert module.tokens == 4 * 64


def test_outside_the_blocks_tensors_are_kept(site: Site, make: MakeWorker) -> None:
    names = [NORM]
    assert LM_HEAD not in site.tensors  # tied
    record = make().run(PassThrough(setting=site.setting, tensors={name: site.digests[name] for name in names}))
    assert record.tensors == {NORM: site.digests[NORM]}
    assert [(entry.source, entry.fate, entry.stored_as) for entry in record.ledger] == [(NORM, "kept", (NORM,))]
    assert record.bits == 64 * 16


def block_key(site: Site, recipe: Any = RECIPE, propagate: Any = "original", seed: int = 0) -> str:
    inputs = (put_tensors(site.workspace, {"hidden": torch.full((1, 2, 64), float(seed))}),)
    return site.block(0, inputs, recipe, propagate).key()


CHANGES: dict[str, Callable[[Site], str]] = {
    "a token": lambda site: block_key(site, seed=1),
    "compute_dtype": lambda site: block_key(Site(source=site.source, work=site.work, compute_dtype="bfloat16")),
    "propagate": lambda site: block_key(site, propagate="compressed"),
    "bits": lambda site: block_key(site, {**RECIPE, "weights": {**RECIPE["weights"], "bits": 8}}),
    "group size": lambda site: block_key(site, {**RECIPE, "weights": {**RECIPE["weights"], "group_size": 64}}),
    "symmetry": lambda site: block_key(site, {**RECIPE, "weights": {**RECIPE["weights"], "symmetric": False}}),
    "quantizer": lambda site: block_key(site, GPTQ),
    "damping": lambda site: block_key(
        site, {**RECIPE, "weights": {**RECIPE["weights"], "quantizer": {"kind": "gptq", "damping": 0.02}}}
    ),
    "compensation": lambda site: block_key(site, {**RECIPE, "compensation": {"kind": "none"}}),
    "rank": lambda site: block_key(site, {**RECIPE, "compensation": {"kind": "svd", "rank": {"count": 5}}}),
    "activations": lambda site: block_key(site, {**RECIPE, "activations": {"bits": 8}}),
    "keep": lambda site: block_key(site, {**RECIPE, "keep": ["lm_head", "*.o_proj"]}),
    "an override": lambda site: block_key(
        site, {**RECIPE, "overrides": [{"match": "*.layers.0.mlp.down_proj", "weights": {"bits": 8}}]}
    ),
}


def test_every_change_that_matters_changes_the_key(site: Site) -> None:
    keys = {"nothing": block_key(site), **{name: change(site) for name, change in CHANGES.items()}}
    assert len(set(keys.values())) == len(CHANGES) + 1


def test_one_weight_changes_the_key(site: Site, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    changed = tmp_path / "changed"
    shutil.copytree(site.source, changed)
    tensors = site.tensors
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    other = Site(source=changed, work=site.work)
    assert block_key(other) != block_key(site)
    # Block 1 has other weights, and knows nothing of block 0's.
    inputs = (put_tensors(site.workspace, {"hidden": torch.zeros(1, 2, 64)}),)
    assert other.block(1, inputs).key() == site.block(1, inputs).key()


def test_what_does_not_matter_changes_no_key(site: Site, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(site.source, moved)
    assert block_key(Site(source=moved, work=tmp_path / "other work")) == block_key(site)
    recipe = {**RECIPE, "overrides": [{"match": "*.layers.1.*", "weights": {"bits": 8}}]}
    assert block_key(site, recipe) == block_key(site)


def test_the_model_and_its_name_are_not_the_same(site: Site) -> None:
    spec = site.block(0, ())
    config = dict(spec.setting.config)

    def key(**changes: Any) -> str:
        setting = spec.setting.model_copy(update={"config": {**config, **changes}})
        return spec.model_copy(update={"setting": setting}).key()

    assert key(_name_or_path="elsewhere", transformers_version="9.9") == key()
    assert key(rms_norm_eps=1e-3) != key()


def test_jobs_that_differ_in_recipe_share_the_forward_pass(site: Site) -> None:
    inputs = (put_tensors(site.workspace, {"hidden": torch.zeros(1, 2, 64)}),)
    one, other = site.block(0, inputs), site.block(0, inputs, GPTQ)
    assert one.calibrate_key() == other.calibrate_key()
    assert one.key() != other.key()


def test_a_family_whose_weights_do_not_fit_groups_is_refused(tmp_path: Path, make: MakeWorker) -> None:
    checkpoint(Case("llama", {"intermediate_size": 80}), tmp_path / "model")
    site = Site(source=tmp_path / "model", work=tmp_path / "work")
    worker = make()
    with pytest.raises(ValueError, match="expected a multiple of group_size 32"):
        worker.run(Compress(block=site.block(0, embedded(worker, site))))


def test_a_block_that_feeds_on_compressed_ones_has_no_first_half(site: Site, make: MakeWorker) -> None:
    worker = make()
    spec = site.block(0, embedded(worker, site), GPTQ, propagate="compressed")
    with pytest.raises(ValueError, match="block 0: propagate compressed: expected original"):
        worker.run(calibration(spec))


class Once(Config, Task[int]):
    """Fails as it is told."""

    kind: ClassVar[str] = "once"
    fails: bool

    @property
    def name(self) -> str:
        return self.kind

    @property
    def patience(self) -> float:
        return 1.0

    def run(self, context: TaskContext) -> int:
        if self.fails:
            raise CheckpointError("on purpose")
        return 1


def test_what_a_task_leaves_that_fails_is_given_back_before_the_next(
    make: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[torch.device] = []
    monkeypatch.setattr("counterweight.workers.worker.release", released.append)
    one = make()
    one.run(Once(fails=False))
    with pytest.raises(CheckpointError, match="on purpose"):
        one.run(Once(fails=True))
    assert not released
    assert one.run(Once(fails=False)) == one.run(Once(fails=False)) == 1
    assert len(released) == 1
