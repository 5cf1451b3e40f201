"""Metrics of some windows of text under the original, the quantized and the compensated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from counterweight.workers.config import Config
from counterweight.workers.errors import CheckpointError, IntegrityError
from counterweight.workers.keys import digest
from counterweight.workers.metrics import METRICS
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from counterweight.workers.context import TaskContext
    from counterweight.workers.models.block_builder import Block, BlockBuilder

BASELINE, QUANTIZED, COMPENSATED, PREFILL = "baseline", "quantized", "compensated", "compensated_prefill"
VARIANTS = (BASELINE, QUANTIZED, COMPENSATED, PREFILL)
"""The models that validation compares: the original; its codes alone; with branches and residual stores, which correct every
token, as when tokens come one at a time (decoding); with branches alone, as stores leave a text that is given whole
(prefill). An artifact without residual stores has no `compensated_prefill`: it is `compensated`."""


WindowMetrics = Mapping[str, float]
"""Metric -> its number for one window under one model."""


class EvaluateRecord(Record):
    """Variant -> metrics of the windows, in order."""

    windows: Mapping[str, tuple[WindowMetrics, ...]]
    routers: Mapping[str, Mapping[int, tuple[float, ...]]] = Field(default_factory=dict)
    """Variant -> sparse block -> share of the tokens of each window that go to the same experts as the original's."""
    timing: Timing


class Evaluate(Config, DurableTask[EvaluateRecord]):
    """Metrics of windows [start, stop) of a token set, under every variant of an artifact and under the model that it was made
    from."""

    kind: ClassVar[str] = "evaluate"
    record: ClassVar[type[EvaluateRecord]] = EvaluateRecord

    setting: Setting
    tensors: Mapping[str, str]
    """Every source tensor -> sha256."""
    artifact: str
    """Root URI of the artifact's files."""
    ledger: str
    """sha256 of the artifact's ledger, which holds the digest of every stored tensor."""
    tokens: Blob
    start: int
    stop: int
    written: bool = False
    """Whether the job itself has written the artifact: what is wrong with it nobody has asked for."""

    def key(self) -> str:
        shared = {**self.setting.determines(), "compute_dtype": "float32"}
        return digest(
            [
                self.kind,
                [metric.name for metric in METRICS],
                VARIANTS,
                shared,
                dict(self.tensors),
                self.ledger,
                self.tokens.sha256,
                self.start,
                self.stop,
            ]
        )

    @property
    def name(self) -> str:
        return f"validation of windows {self.start} to {self.stop - 1}"

    @property
    def patience(self) -> float:
        parameters, tokens = self.setting.parameters, self.tokens.size // 4  # of all windows, which are int32
        flops = 2 * parameters * tokens * len(VARIANTS)
        return patience(bytes=8 * parameters, flops=flops, device=self.setting.device)

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> EvaluateRecord:
        import torch

        from counterweight.workers.clock import Clock
        from counterweight.workers.compressed import CompressedModel
        from counterweight.workers.evaluation import advance, compressed_blocks, measure, variants_of
        from counterweight.workers.loaded_block import load_block
        from counterweight.workers.memory import release
        from counterweight.workers.models.routing import Agreement
        from counterweight.workers.models.source import outside

        clock = Clock(context.device)
        checkpoint, builder = context.source(self.setting)
        try:
            model = CompressedModel.open(open_store(self.artifact), ledger_sha256=self.ledger)
        except CheckpointError as error:
            if not self.written:
                raise
            raise IntegrityError(f"{error}: not what was written") from error
        variants = variants_of(model)
        measured = list(dict.fromkeys(variants.values()))
        ids = workspace.get_tensors(self.tokens)["input_ids"][self.start : self.stop].long().to(context.device)
        batches = ids.split(shard_sequences(ids.shape[1]))
        original = outside(checkpoint, builder, self.tensors)
        plain = self.setting.model_copy(update={"rotation": None})

        def ends(one: BlockBuilder, embedding: Tensor, head: Mapping[str, Tensor]) -> tuple[list[Tensor], nn.Module]:
            embed = one.embedding(embedding, context.device, torch.float32)
            with torch.no_grad():
                return [embed(batch) for batch in batches], one.head(head, context.device, torch.float32)

        # The compressed model may live in other coordinates than the original, its variants share theirs.
        of_compressed = ends(model.builder, model.embedding(), model.head())
        of_original = ends(builder, original[builder.names.embedding], original)
        of_variant = dict.fromkeys(measured, of_compressed) | {BASELINE: of_original}

        def blocks(index: int) -> dict[str, Block]:
            release(context.device)
            found = compressed_blocks(model, index, measured[1:], context.device)
            names = {part.source for part in builder.layout.sources(index, self.tensors).values()}
            digests = {name: self.tensors[name] for name in names}
            return {BASELINE: load_block(context, plain, index, digests, torch.float32).block, **found}

        first = {variant: hidden for variant, (hidden, _) in of_variant.items()}
        agreement = Agreement()
        hidden = advance(first, blocks, builder.blocks, context.pool, agreement)
        heads = {variant: head for variant, (_, head) in of_variant.items()}
        windows = measure(hidden, batches, heads, context.pool, agreement)
        clock.lap("forward")
        record = EvaluateRecord(
            windows={variant: tuple(windows[same]) for variant, same in variants.items()},
            routers={
                variant: {block: tuple(found) for block, found in agreement.windows.get(same, {}).items()}
                for variant, same in variants.items()
            },
            timing=clock.timing(),
        )
        release(context.device)
        return record
