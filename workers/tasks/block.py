"""One transformer block: what a job asks of it, and what was made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from counterweight.workers.batches import BATCH_BYTES
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.config import Config
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.keys import digest, versions
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import LedgerEntry, ModuleReport, Timing
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.workspace import Blob, Record, Workspace

CALIBRATE, COMPRESS, GAINS = "forward", "block", "gains"
"""Kinds of a block's tasks, as their records are filed."""


class BlockSpec(Config):
    """One transformer block: which, from which weights, on which inputs, compressed how."""

    setting: Setting
    index: int
    tensors: Mapping[str, str]
    """Source tensors of the block -> sha256."""
    inputs: tuple[Blob, ...]
    """Hidden states that enter the block, one blob per shard, in order."""
    original_inputs: tuple[Blob, ...] = ()
    """What enters the block in the original model, likewise; empty where that is the same or nothing looks at it."""
    recipe: Mapping[str, ModuleRecipe]
    """Linear (name relative to the block) -> what applies to it; linears that are kept are absent."""
    propagate: Literal["original", "compressed"]
    experts: ExpertCalibration | None = None
    """How a sparse block's are calibrated; null in a dense one, and where they are solved on their own tokens alone."""
    since: int | None = None
    """The first block of its segment, which sees the original's activations; null: every block does. For people, as
    `tokens`."""
    tokens: str = ""
    """sha256 of the calibration tokens, which decide the block's inputs; for people."""
    budgeted: tuple[str, ...] = ()
    """Linears whose ranks a whole model has shared out: their second moments were gathered for that, even where a rank of 0
    leaves no step that looks at them. No part of the result."""
    passes: tuple[tuple[str, ...], ...] = ()
    """Linears that are solved after each pass over the shards, which gathers the statistics of their inputs alone: what takes
    less memory, and no part of the result. Those of one input are in one pass, and those of one expert. Empty: all are."""
    part_of_passes: bool = False
    """Whether all linears of the block take several passes, of which these are a part."""

    lasting: bool = True
    """Whether hidden states behind the block are written to the store even where they are kept in memory; no part of the
    result."""
    batch_bytes: int = BATCH_BYTES[False]
    """That solves of one shape may take together; no part of the result."""
    drawn_from: int | None = None
    """The first of the shards that were drawn for experts which saw too few tokens in those before: only these are solved on
    them. null: none was."""
    held_out_from: int | None = None
    """The first of the shards that nothing is solved on, behind the others: what was is judged by them. null: none is."""

    @property
    def solving(self) -> BlockSpec:
        """The same on the shards that everything is solved on."""
        return self.before(self.ends[0])

    @property
    def ends(self) -> tuple[int, int]:
        """Behind the shards that everything is solved on; and behind those that were drawn for experts."""
        seen = len(self.inputs) if self.held_out_from is None else self.held_out_from
        return (seen if self.drawn_from is None else self.drawn_from), seen

    @property
    def every_token(self) -> bool:
        """Whether experts are calibrated on all tokens, and not on those that the router sends them."""
        return self.experts is not None and self.experts.every_token

    flops: int = 0
    """Floating-point operations of its tasks, and the bytes of its weights: for `Task.patience`, no part of the result."""
    bytes: int = 0

    @property
    def lends(self) -> bool:
        """Whether experts run on their weights as they were read: where memory is short, and nothing trains them."""
        short = self.part_of_passes or len(self.passes) > 1
        return short and all(part.tuning is None for part in self.recipe.values())

    def solving_only(self, linears: Collection[str]) -> BlockSpec:
        """The same where these linears alone are solved, in passes in which all are or fewer."""
        passes = [tuple(name for name in own if name in linears) for own in self.passes or (tuple(linears),)]
        found = tuple(own for own in passes if own) or ((),)
        return self.model_copy(update={"passes": found, "part_of_passes": len(self.passes) > 1})

    def before(self, shard: int) -> BlockSpec:
        """The same on the shards before this one alone."""
        return self.model_copy(update={"inputs": self.inputs[:shard], "original_inputs": self.original_inputs[:shard]})

    def calibrate_key(self) -> str:
        """Key of the block's *original* output: no recipe enters, so jobs that differ in recipe share it."""
        return digest(
            [
                CALIBRATE,
                self.setting.determines(),
                self.index,
                dict(self.tensors),
                [blob.sha256 for blob in (*self.inputs, *self.original_inputs)],
            ]
        )

    def key(self) -> str:
        """Key of the compressed block."""
        recipe = {name: part.model_dump(mode="json") for name, part in self.recipe.items()}
        # Records made when both streams were one list are keyed with true.
        streams = "two" if self.original_inputs else False
        whole = [COMPRESS, self.calibrate_key(), self.propagate, streams, recipe, versions(self.recipe)]
        return digest([*whole, *self._younger_key()])

    def statistics_key(self) -> str:
        """Key of what calibration leaves in a worker's memory: of tasks with equal keys one calibration is enough."""
        streams = len(self.original_inputs)
        gathers = {name: part.gathers(products=name in self.budgeted) for name, part in self.recipe.items()}
        return digest([self.calibrate_key(), self.propagate, streams, gathers, self.passes, *self._younger_key()])

    def _younger_key(self) -> list[object]:
        """What a key has only where it is asked for: in a sparse block; with shards that are held out, or drawn."""
        experts = [] if self.experts is None else [self.experts.model_dump(mode="json"), versions(self.experts)]
        held_out = [] if self.held_out_from is None else [{"held out from": self.held_out_from}]
        drawn = [] if self.drawn_from is None else [{"drawn from": self.drawn_from}]
        return [*experts, *held_out, *drawn]


class BlockTask(Config):
    """What the tasks of one block have in common."""

    kind: ClassVar[str]

    block: BlockSpec

    @property
    def name(self) -> str:
        return f"block {self.block.index} ({self.kind})"

    @property
    def block_index(self) -> int:
        return self.block.index

    @property
    def reads(self) -> tuple[Blob, ...]:
        return (*self.block.inputs, *self.block.original_inputs)

    @property
    def patience(self) -> float:
        hidden = sum(blob.size for blob in self.reads)
        return patience(bytes=self.block.bytes + 2 * hidden, flops=self.block.flops, device=self.block.setting.device)

    def workspace(self) -> Workspace:
        return self.block.setting.open_workspace()


class BlockRecord(Record):
    """A compressed block: finished checkpoint shard, adapter factors, what it cost and won."""

    index: int
    checkpoint: Blob
    adapter: Blob | None
    outputs: tuple[Blob, ...] = ()
    """Hidden states after the *compressed* block (propagate: compressed); otherwise empty."""
    original_outputs: tuple[Blob, ...] = ()
    """Hidden states after the original block, where the task has `original_inputs`."""
    tensors: Mapping[str, str]
    """Tensors in the checkpoint shard -> sha256 of dtype, shape and bytes."""
    factors: Mapping[str, str]
    """Tensors of the adapter -> sha256, likewise."""
    residual: Blob | None = None
    """The block's residual stores."""
    residuals: Mapping[str, str] = Field(default_factory=dict)
    """Tensors of the residual stores -> sha256, likewise."""
    modules: tuple[ModuleReport, ...]
    formats: Mapping[str, ModuleFormat]
    """Full module name, as stored -> format."""
    kept_bits: int = Field(ge=0)
    """Bits of the block's tensors that were carried over: norms, biases, routers, kept linears."""
    ledger: tuple[LedgerEntry, ...]
    timing: Timing
    made_from: Mapping[str, str] = Field(default_factory=dict)
    """Parts of the key, see `workers.tasks.made_from`; empty in records that are older than it."""

    @property
    def stored(self) -> tuple[Blob, ...]:
        """The blobs that an artifact is made of."""
        return tuple(blob for blob in (self.checkpoint, self.adapter, self.residual) if blob is not None)

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        return (*self.outputs, *self.original_outputs)
