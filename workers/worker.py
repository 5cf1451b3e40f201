"""A worker: one process, one device, doing tasks one after another. Knows no job.

Each method is one task: look the record up (somebody may have finished it), otherwise do the work and commit it. A
block's task has two halves, because the block after it waits only for the first:

1. `forward` reads the block's weights, runs the *original* block over its inputs, gathers the statistics, stores the
   outputs. The statistics and the block stay in this process.
2. `block` solves, stores the finished checkpoint shard and commits. When the first half was done elsewhere or by a
   process that died, it is done again here; the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.block import CompressedLinear, calibrate, compress, install, tensor_bits
from counterweight.workers.calibration.sampling import sample
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.checkpoint.digest import TensorDigest, tensor_digest
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.clock import Clock
from counterweight.workers.compressed import CompressedModel
from counterweight.workers.errors import CheckpointError
from counterweight.workers.evaluation import advance, compressed_blocks, measure, variants_of
from counterweight.workers.interchange.compressed_tensors import scale_dtype
from counterweight.workers.join import join_tensors
from counterweight.workers.memory import release, settle
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.models.layout import EMBEDDING, ModelLayout
from counterweight.workers.models.source import outside, whole
from counterweight.workers.parallel import OrderedPool
from counterweight.workers.prepare import prepare
from counterweight.workers.recipe import NoCompensation, Weights
from counterweight.workers.shard import write_block
from counterweight.workers.solve import gains
from counterweight.workers.storage import open_store, stream_sha256
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks import (
    BASELINE,
    BLOCK,
    EMBED,
    EVALUATE,
    FORWARD,
    GAINS,
    KEEP,
    BlockRecord,
    BlockSpec,
    Device,
    EmbedSpec,
    EvaluateRecord,
    EvaluateSpec,
    GainsRecord,
    HiddenRecord,
    KeepRecord,
    KeepSpec,
    LedgerEntry,
    SampleSpec,
    Setting,
    Timing,
    shard_sequences,
)
from counterweight.workers.transforms.rotation import residual_hadamard, rotate_block, rotate_embedding, rotated_outside
from counterweight.workers.transforms.smoothing import fold
from counterweight.workers.tuning.lsi import LinearFormat, tune
from counterweight.workers.workspace import Blob, Workspace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBlock:
    """A source block that can run, and what it was made of.

    parameters: in the recipe's coordinates; what is kept is carried over, the rest is solved. dtypes: of the parameters in
    the source, in which they are stored. online: linear -> transform of its input at inference.
    """

    block: Block
    parameters: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    online: dict[str, Hadamard]


@dataclass(frozen=True, slots=True)
class _Held:
    """The first half of a block's task, kept for the second."""

    key: str
    loaded: LoadedBlock
    outliers: Mapping[SharedInputGroup, Tensor]
    statistics: dict[SharedInputGroup, InputStatistics]
    outputs: tuple[Blob, ...]
    timing: Timing


class Worker:
    """Runs tasks on one device.

    device: `cuda` runs on the GPU when there is one and on the CPU otherwise; the records say which it was.
    threads: on a CPU, how many threads share the shards and the solves; results do not depend on it.
    """

    def __init__(self, device: Device = "cpu", threads: int = 1) -> None:
        # One thread inside an operation, several operations at a time: bits then do not depend on `threads`.
        torch.set_num_threads(1)
        # Float32 products must be float32 products: TF32 keeps 10 bits of mantissa.
        torch.backends.cuda.matmul.allow_tf32 = False
        on_gpu = device == "cuda" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self._pool = OrderedPool(1 if on_gpu else threads)
        self._sources: dict[str, tuple[Checkpoint, BlockBuilder]] = {}
        self._held: _Held | None = None
        settle()

    def ready(self) -> str:
        """The kind of device this worker computes on."""
        return self.device.type

    def describe(self, config: Mapping[str, Any]) -> ModelLayout:
        """Names and shapes of the model with this config.json. CheckpointError, UnsupportedModelError."""
        return BlockBuilder(config).layout

    def sample(self, spec: SampleSpec) -> list[list[int]]:
        """Windows of tokens that the model draws itself; it is in memory as a whole."""
        checkpoint = Checkpoint.open(open_store(spec.source))
        model = whole(checkpoint, BlockBuilder(checkpoint.config), self.device, DTYPES[spec.compute_dtype])
        ids = sample(model, spec.sequences, spec.length, temperature=spec.temperature, seed=spec.seed)
        del model
        release(self.device)
        rows: list[list[int]] = ids.tolist()
        return rows

    def inspect(self, source: str, names: Iterable[str]) -> dict[str, TensorDigest]:
        """Digest and finiteness of source tensors; reads each byte once, in bounded memory."""
        return Checkpoint.open(open_store(source)).inspect(names)

    def embed(self, spec: EmbedSpec) -> HiddenRecord:
        """Token ids to the hidden states that enter block 0, cut into shards."""
        workspace = Workspace(open_store(spec.setting.workspace))
        key = spec.key()
        if (done := workspace.lookup(EMBED, key, HiddenRecord)) is not None and _all_there(workspace, done.outputs):
            return done
        clock = Clock(self.device)
        checkpoint, builder = self._source(spec.setting)
        name, sha256 = spec.tensor
        weight = checkpoint.read(name, sha256=sha256)
        if (rotation := spec.setting.rotation) is not None and rotation.residual:
            weight = rotate_embedding(weight, residual_hadamard(builder.hidden_size, rotation))
        module = builder.embedding(weight, self.device, DTYPES[spec.setting.compute_dtype])
        ids = workspace.get_tensors(spec.tokens)["input_ids"]
        clock.lap("load")
        with torch.no_grad():
            shards = [module(part.long().to(self.device)) for part in ids.split(shard_sequences(ids.shape[1]))]
        clock.lap("forward")
        outputs = tuple(_put_hidden(workspace, shard) for shard in shards)
        clock.lap("write")
        return workspace.commit(EMBED, key, HiddenRecord(outputs=outputs, timing=clock.timing()))

    def keep(self, spec: KeepSpec) -> KeepRecord:
        """Carries tensors outside the blocks over into a checkpoint shard of their own."""
        workspace = Workspace(open_store(spec.setting.workspace))
        key = spec.key()
        if (done := workspace.lookup(KEEP, key, KeepRecord)) is not None and workspace.has(done.checkpoint):
            return done
        clock = Clock(self.device)
        checkpoint, builder = self._source(spec.setting)
        tensors = checkpoint.read_many(spec.tensors, sha256=spec.tensors)
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in tensors}
        if (rotation := spec.setting.rotation) is not None and rotation.residual:
            tensors, sources = rotated_outside(tensors, residual_hadamard(builder.hidden_size, rotation))
        clock.lap("load")
        blob = workspace.put_tensors(tensors)
        clock.lap("write")
        record = KeepRecord(
            checkpoint=blob,
            tensors={name: tensor_digest(tensor) for name, tensor in tensors.items()},
            ledger=tuple(
                LedgerEntry(source=source, shape=checkpoint.entry(source).shape, fate="kept", stored_as=stored)
                for source, stored in sources.items()
            ),
            bits=sum(tensor_bits(tensor) for tensor in tensors.values()),
            timing=clock.timing(),
        )
        return workspace.commit(KEEP, key, record)

    def forward(self, spec: BlockSpec) -> HiddenRecord:
        """First half of a block's task; returns where the original block's outputs are. ValueError when none are wanted."""
        if spec.propagate != "original":
            raise ValueError(
                f"block {spec.index}: propagate {spec.propagate}: expected original, which alone has two halves"
            )
        workspace = Workspace(open_store(spec.setting.workspace))
        held = self._calibrated(spec, workspace)
        record = HiddenRecord(outputs=held.outputs, timing=held.timing)
        return workspace.commit(FORWARD, spec.forward_key(), record)

    def block(self, spec: BlockSpec) -> BlockRecord:
        """The whole of a block's task; the first half is not repeated when this process has just done it."""
        workspace = Workspace(open_store(spec.setting.workspace))
        key = spec.key()
        if (done := workspace.lookup(BLOCK, key, BlockRecord)) is not None and _shards_there(workspace, done):
            return done
        held = self._calibrated(spec, workspace)
        self._held = None
        clock = Clock(self.device, held.timing)
        held, codes = self._tuned(spec, held, workspace)
        weights = {name: held.loaded.parameters[f"{name}.weight"] for name in spec.recipe}
        linears, reports = compress(
            {name: weight.to(self.device) for name, weight in weights.items()},
            held.statistics,
            spec.recipe,
            scale_dtypes={name: scale_dtype(name, held.loaded.dtypes[f"{name}.weight"]) for name in weights},
            factor_dtypes={name: held.loaded.dtypes[f"{name}.weight"] for name in weights},
            outliers=held.outliers,
            codes=codes,
            pool=self._pool,
        )
        linears = {name: replace(linear, transform=held.loaded.online.get(name)) for name, linear in linears.items()}
        clock.lap("solve")
        outputs = self._propagate(spec, held.loaded.block, linears, held.outputs, workspace)
        clock.lap("forward")
        _, builder = self._source(spec.setting)
        record = write_block(
            spec,
            builder,
            held.loaded.parameters,
            held.loaded.dtypes,
            linears,
            reports,
            outputs,
            workspace,
            held.timing,
        )
        clock.lap("write")
        record = record.model_copy(update={"timing": clock.timing()})
        del held, linears
        release(self.device)
        return workspace.commit(BLOCK, key, record)

    def gains(self, spec: BlockSpec) -> GainsRecord:
        """What branches could win in this block, for a budget that the model shares out; after its first half."""
        workspace = Workspace(open_store(spec.setting.workspace))
        key = spec.key()
        if (done := workspace.lookup(GAINS, key, GainsRecord)) is not None:
            return done
        held = self._calibrated(spec, workspace)
        found: dict[str, tuple[float, ...]] = {}
        for group, statistics in held.statistics.items():
            for name in group:
                part = spec.recipe.get(name)
                if part is None or isinstance(part.compensation, NoCompensation):
                    continue
                (own,) = gains(
                    part,
                    [held.loaded.parameters[f"{name}.weight"].float().to(self.device)],
                    statistics,
                    held.outliers.get(group),
                    scale_dtype=scale_dtype(name, held.loaded.dtypes[f"{name}.weight"]),
                )
                found[name] = tuple(own.tolist())
        return workspace.commit(GAINS, key, GainsRecord(gains=found))

    def evaluate(self, spec: EvaluateSpec) -> EvaluateRecord:
        """Metrics of a range of windows under the original, the quantized and the compensated model."""
        workspace = Workspace(open_store(spec.setting.workspace))
        key = spec.key()
        if (done := workspace.lookup(EVALUATE, key, EvaluateRecord)) is not None:
            return done
        clock = Clock(self.device)
        checkpoint, builder = self._source(spec.setting)
        model = CompressedModel.open(open_store(spec.artifact), ledger_sha256=spec.ledger)
        variants = variants_of(model)
        ids = workspace.get_tensors(spec.tokens)["input_ids"][spec.start : spec.stop].long().to(self.device)
        batches = ids.split(shard_sequences(ids.shape[1]))
        original = outside(checkpoint, builder, spec.tensors)
        plain = spec.setting.model_copy(update={"rotation": None})

        def ends(one: BlockBuilder, embedding: Tensor, head: Mapping[str, Tensor]) -> tuple[list[Tensor], nn.Module]:
            embed = one.embedding(embedding, self.device, torch.float32)
            with torch.no_grad():
                return [embed(batch) for batch in batches], one.head(head, self.device, torch.float32)

        # The compressed model may live in other coordinates than the original, its variants share theirs.
        of_compressed = ends(model.builder, model.embedding(), model.head())
        of_variant = dict.fromkeys(variants, of_compressed) | {BASELINE: ends(builder, original[EMBEDDING], original)}

        def blocks(index: int) -> dict[str, Block]:
            release(self.device)
            found = compressed_blocks(model, index, variants[1:], self.device)
            names = {part.source for part in builder.layout.sources(index, spec.tensors).values()}
            digests = {name: spec.tensors[name] for name in names}
            return {BASELINE: self.load_block(plain, index, digests, torch.float32).block, **found}

        first = {variant: hidden for variant, (hidden, _) in of_variant.items()}
        hidden = advance(first, blocks, builder.blocks, self._pool)
        windows = measure(hidden, batches, {variant: head for variant, (_, head) in of_variant.items()}, self._pool)
        clock.lap("forward")
        record = EvaluateRecord(
            windows={variant: tuple(found) for variant, found in windows.items()}, timing=clock.timing()
        )
        release(self.device)
        return workspace.commit(EVALUATE, key, record)

    def join(self, workspace: str, parts: Sequence[tuple[Blob, Sequence[str]]], output: str, key: str) -> Written:
        """Writes blobs of tensors as one file below the root URI `output`; returns its size and sha256."""
        return join_tensors(Workspace(open_store(workspace)), parts, open_store(output), key)

    def checksum(self, root: str, key: str) -> str:
        """sha256 of an object's bytes, in bounded memory."""
        return stream_sha256(open_store(root), key)

    def close(self) -> None:
        """Drops what is held and ends the threads."""
        self._held = None
        self._pool.close()

    # -- internals ----------------------------------------------------------------------------------------------

    def _source(self, setting: Setting) -> tuple[Checkpoint, BlockBuilder]:
        if setting.source not in self._sources:
            self._sources.clear()
            checkpoint = Checkpoint.open(open_store(setting.source))
            self._sources[setting.source] = (checkpoint, BlockBuilder(setting.config))
        return self._sources[setting.source]

    def _calibrated(self, spec: BlockSpec, workspace: Workspace) -> _Held:
        key = spec.key()
        if self._held is not None and self._held.key == key:
            return self._held
        self._held = None
        release(self.device)
        clock = Clock(self.device)
        dtype = DTYPES[spec.setting.compute_dtype]
        loaded = self.load_block(spec.setting, spec.index, spec.tensors, dtype)
        block = loaded.block
        clock.lap("load")
        keep_outputs = spec.propagate == "original" or spec.paired

        def emit(output: Tensor) -> Blob | None:
            return _put_hidden(workspace, output) if keep_outputs else None

        inputs, originals = self._streams(spec, workspace)
        builder = self._source(spec.setting)[1]
        family = family_of(builder.config.model_type)
        chosen = prepare(block, spec.recipe, loaded.parameters, family, loaded.online, inputs[0])
        if chosen.scales:
            # What the original block makes is shared between recipes, so it comes from the block as it was.
            _, outputs = calibrate(block, originals or inputs, emit, {}, self._pool) if keep_outputs else ({}, [])
            parameters = fold(family, chosen.scales, loaded.parameters, loaded.online)
            loaded = replace(
                loaded, parameters=parameters, block=self._block(builder, spec.index, parameters, loaded.online, dtype)
            )
            statistics, _ = calibrate(loaded.block, inputs, lambda _: None, chosen.gatherings, self._pool, originals)
        else:
            statistics, outputs = calibrate(block, inputs, emit, chosen.gatherings, self._pool, originals)
        clock.lap("forward")
        stored = tuple(blob for blob in outputs if blob is not None)
        self._held = _Held(
            key=key,
            loaded=loaded,
            statistics=statistics,
            outliers=chosen.outliers,
            outputs=stored,
            timing=clock.timing(),
        )
        return self._held

    def _tuned(
        self, spec: BlockSpec, held: _Held, workspace: Workspace
    ) -> tuple[_Held, dict[str, StoredWeight] | None]:
        """Codes that were trained, where the recipe asks for it; and what is held, with the transforms that were learned."""
        tunings = {part.tuning for part in spec.recipe.values() if part.tuning is not None}
        if not tunings:
            return held, None
        (options,) = tunings
        inputs, originals = self._streams(spec, workspace)
        loaded = held.loaded
        groups = {name: group for group in loaded.block.groups for name in group}
        formats = {
            name: LinearFormat(
                weights=part.weights.grid(),
                scale_dtype=scale_dtype(name, loaded.dtypes[f"{name}.weight"]),
                activations=held.statistics[groups[name]].activations,
            )
            for name, part in spec.recipe.items()
            if isinstance(part.weights, Weights)  # which a recipe with tuning asks for
        }
        targets = [loaded.block.run(load()) for load in originals or inputs]
        found = tune(loaded.block, [load() for load in inputs], targets, formats, options)
        if not found.norms:
            return held, dict(found.weights)
        builder = self._source(spec.setting)[1]
        family = family_of(builder.config.model_type)
        scales = {}
        for group in loaded.block.groups:
            norm = f"{family.norm_before(group[0])}.weight"
            if norm in found.norms:
                before, after = (
                    value.float() + family.norm_offset for value in (loaded.parameters[norm], found.norms[norm])
                )
                scales[group] = before / after
        parameters = fold(family, scales, loaded.parameters, loaded.online)
        block = self._block(builder, spec.index, parameters, loaded.online, DTYPES[spec.setting.compute_dtype])
        gatherings = {group: statistics.gathering for group, statistics in held.statistics.items()}
        statistics, _ = calibrate(block, inputs, lambda _: None, gatherings, self._pool, originals)
        loaded = replace(loaded, parameters=parameters, block=block)
        return replace(held, loaded=loaded, statistics=statistics), dict(found.weights)

    def load_block(self, setting: Setting, index: int, digests: Mapping[str, str], dtype: torch.dtype) -> LoadedBlock:
        """A source block on the device, every tensor verified, in the setting's coordinates."""
        checkpoint, builder = self._source(setting)
        slices = builder.layout.sources(index, checkpoint.names)
        tensors = checkpoint.read_many(digests, sha256=digests)
        absent = {part.source for part in slices.values()} - tensors.keys()
        if absent:
            raise CheckpointError(f"block {index}: the task lists no digest for {sorted(absent)[:3]}")
        parameters = {name: part.of(tensors[part.source]) for name, part in slices.items()}
        dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
        online: dict[str, Hadamard] = {}
        if setting.rotation is not None:
            parameters, online = rotate_block(
                builder.config.model_type,
                parameters,
                setting.rotation,
                heads=builder.config.num_attention_heads,
                key_value_heads=builder.config.num_key_value_heads,
            )
        block = self._block(builder, index, parameters, online, dtype)
        return LoadedBlock(block=block, parameters=parameters, dtypes=dtypes, online=online)

    def _block(
        self,
        builder: BlockBuilder,
        index: int,
        parameters: Mapping[str, Tensor],
        online: Mapping[str, Hadamard],
        dtype: torch.dtype,
    ) -> Block:
        block = builder.block(index, parameters, self.device, dtype)
        for name, transform in online.items():
            block.transform_input(name, transform)
        return block

    def _streams(self, spec: BlockSpec, workspace: Workspace) -> tuple[list[Load], list[Load]]:
        """Loaders of the shards that enter the block, and of those that enter it in the original model where they differ."""
        loads = [_loader(workspace, blob, self.device) for blob in spec.inputs]
        return loads[: spec.shards], loads[spec.shards :]

    def _propagate(
        self,
        spec: BlockSpec,
        block: Block,
        linears: Mapping[str, CompressedLinear],
        originals: tuple[Blob, ...],
        workspace: Workspace,
    ) -> tuple[Blob, ...]:
        if spec.propagate == "original":
            return ()
        install(block, linears)
        inputs, _ = self._streams(spec, workspace)
        emitted = self._pool.map(lambda load: _put_hidden(workspace, block.run(load())), inputs)
        return (*emitted, *originals)


Load = Callable[[], Tensor]
"""Reads one shard of hidden states."""


def _loader(workspace: Workspace, blob: Blob, device: torch.device) -> Load:
    return lambda: workspace.get_tensors(blob)["hidden"].to(device)


def _put_hidden(workspace: Workspace, hidden: Tensor) -> Blob:
    return workspace.put_tensors({"hidden": hidden.cpu()}, durable=False)


def _all_there(workspace: Workspace, blobs: Iterable[Blob]) -> bool:
    return all(workspace.has(blob) for blob in blobs)


def _shards_there(workspace: Workspace, record: BlockRecord) -> bool:
    return _all_there(workspace, [*record.stored, *record.outputs])
