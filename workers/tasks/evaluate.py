"""Metrics of some windows of text under the original, the quantized and the compensated model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from counterweight.workers.config import Config
from counterweight.workers.errors import CheckpointError, IntegrityError
from counterweight.workers.keys import digest
from counterweight.workers.metrics import METRICS, PROFILES
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.original import Original, OriginalRecord
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.compressed import CompressedModel
    from counterweight.workers.context import TaskContext
    from counterweight.workers.evaluation import Chosen
    from counterweight.workers.models.block_builder import Block

BASELINE, QUANTIZED, COMPENSATED, PREFILL = "baseline", "quantized", "compensated", "compensated_prefill"
VARIANTS = (BASELINE, QUANTIZED, COMPENSATED, PREFILL)
"""The models that validation compares: the original; its codes alone; with branches and residual stores, which correct every
token, as when tokens come one at a time (decoding); with branches alone, as stores leave a text that is given whole
(prefill). An artifact without residual stores has no `compensated_prefill`: it is `compensated`."""

HEAD_TOKENS = 256
"""Positions of a window whose logits are in memory at a time. Part of the numerics, because products of other shapes may have
other bits. 256 of a vocabulary of 4096 and of 32,000 take fewer CPU seconds than 128 or 1024."""

WindowMetrics = Mapping[str, float]
"""Metric -> its number for one window under one model."""

WindowProfiles = Mapping[str, tuple[float, ...]]
"""Profile -> its numbers along one window under one model."""


class EvaluateRecord(Record):
    """Variant -> metrics of the windows, in order."""

    windows: Mapping[str, tuple[WindowMetrics, ...]]
    profiles: Mapping[str, tuple[WindowProfiles, ...]]
    """Variant -> likewise, what is measured along the windows."""
    routers: Mapping[str, Mapping[int, tuple[float, ...]]] = Field(default_factory=dict)
    """Variant -> sparse block -> share of the tokens of each window that go to the same experts as the original's."""
    timing: Timing


class Evaluate(Config, DurableTask[EvaluateRecord]):
    """Metrics of windows [start, stop) of a token set, under every variant of an artifact, beside what the model that it was
    made from has made of them."""

    kind: ClassVar[str] = "evaluate"
    record: ClassVar[type[EvaluateRecord]] = EvaluateRecord

    original: Original
    """What the original was run on, in which dtype: all variants are on the same tokens, in the same dtype."""
    found: OriginalRecord
    """What it made of them, and perhaps of others."""
    first: int | None = None
    """The first of the windows that `found` is of; null: none but these. No part of the result."""
    artifact: str
    """Root URI of the artifact's files."""
    ledger: str
    """sha256 of the artifact's ledger, which holds the digest of every stored tensor."""
    shared: bool = False
    """Whether other workers read the artifact at the same time, perhaps on the same machine. No part of the result."""
    written: bool = False
    """Whether the job itself has written the artifact: what is wrong with it nobody has asked for."""

    def key(self) -> str:
        measured = [*(metric.name for metric in METRICS), *(profile.name for profile in PROFILES)]
        return digest([self.kind, measured, VARIANTS, HEAD_TOKENS, self.original.key(), self.ledger])

    @property
    def name(self) -> str:
        return f"validation of windows {self.original.start} to {self.original.stop - 1}"

    @property
    def patience(self) -> float:
        setting, tokens = self.original.setting, self.original.tokens.size // 4  # of all windows, which are int32
        flops = 2 * setting.parameters * tokens * (len(VARIANTS) - 1)
        return patience(bytes=4 * setting.parameters, flops=flops, device=setting.device)

    def workspace(self) -> Workspace:
        return self.original.workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> EvaluateRecord:
        from counterweight.workers.compressed import CompressedModel

        try:
            model = CompressedModel.open(open_store(self.artifact), ledger_sha256=self.ledger)
        except CheckpointError as error:
            if not self.written:
                raise
            raise IntegrityError(f"{error}: not what was written") from error
        with model.shared(self.ledger) if self.shared else nullcontext():
            return self._judge(model, context, workspace)

    def _judge(self, model: CompressedModel, context: TaskContext, workspace: Workspace) -> EvaluateRecord:
        import torch

        from counterweight.workers.clock import Clock
        from counterweight.workers.context import DTYPES
        from counterweight.workers.evaluation import advance, compressed_blocks, measure, variants_of
        from counterweight.workers.memory import release
        from counterweight.workers.models.routing import Routes
        from counterweight.workers.models.source import read_head
        from counterweight.workers.passing import receive
        from counterweight.workers.tensor_blobs import get_tensors

        asked, clock = self.original, Clock(context.device)
        device, dtype = context.device, DTYPES[asked.dtype]
        checkpoint, builder = context.source(asked.setting)
        variants = variants_of(model)
        measured = [variant for variant in dict.fromkeys(variants.values()) if variant != BASELINE]
        ids = get_tensors(workspace, asked.tokens)["input_ids"][asked.start : asked.stop].long().to(device)
        batches = ids.split(shard_sequences(ids.shape[1]))
        # The compressed model may live in other coordinates than the original, its variants share theirs.
        embed = model.builder.embedding(model.embedding(), device, dtype)
        with torch.no_grad():
            first = [embed(batch) for batch in batches]
        own_head = model.builder.head(model.head(), device, dtype)
        original_head = builder.head(read_head(checkpoint, builder, asked.tensors), device, dtype)

        def blocks(index: int) -> dict[str, Block]:
            release(device)
            return compressed_blocks(model, index, measured, device, dtype)

        length = ids.shape[1]
        before = 0 if self.first is None else asked.start - self.first  # windows of `found` that are others'
        outputs = self.found.outputs[before // shard_sequences(length) :][: len(batches)]
        packed = {} if self.found.routed is None else get_tensors(workspace, self.found.routed)
        own = slice(before * length, (before + len(ids)) * length)
        routes = Routes({int(block): choices[own] for block, choices in packed.items()})
        agreed: dict[str, dict[int, list[float]]] = {
            BASELINE: {block: [1.0] * len(ids) for block in sorted(routes.packed)}
        }

        def routed(index: int, variant: str, chosen: Chosen) -> None:
            if shares := routes.agreement(index, chosen, length):
                agreed.setdefault(variant, {})[index] = shares

        turn = context.ahead.in_turn(self.name, builder.blocks, blocks)
        hidden = advance(dict.fromkeys(measured, first), turn, context.pool, routed)
        found = measure(
            {BASELINE: (receive(context, workspace, batch) for batch in outputs), **hidden},
            ids,
            {BASELINE: original_head, **dict.fromkeys(measured, own_head)},
            context.pool,
            agreed,
        )
        clock.lap("forward")
        record = EvaluateRecord(
            windows={variant: found[same].metrics for variant, same in variants.items()},
            profiles={variant: found[same].profiles for variant, same in variants.items()},
            routers={
                variant: {block: tuple(shares) for block, shares in agreed.get(same, {}).items()}
                for variant, same in variants.items()
            },
            timing=clock.timing(),
        )
        release(device)
        return record
