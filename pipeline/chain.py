"""The chain of block tasks: which half of which block can run now, and what a resumed job need not do again.

A block's first half (`forward`) needs the hidden states that the block before it made; its second half needs the first.
With `propagate: original` the first halves form the chain and the second halves run beside it; with `compressed` a
block's whole task is one link. The state is data; `assign` and `settle` are the only transitions, so the chain can be
tested without a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from counterweight.pipeline.policies import Placement
from counterweight.workers.tasks.block import CALIBRATE, COMPRESS, BlockRecord, BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.workspace import Blob, Workspace


class Phase(Enum):
    """Which of a block's tasks."""

    CALIBRATE = "forward"
    COMPRESS = "block"


@dataclass(frozen=True, slots=True)
class Link:
    """A piece of work for one worker: one half of one block."""

    phase: Phase
    spec: BlockSpec

    @property
    def task(self) -> Calibrate | Compress:
        """What the worker does."""
        return Calibrate(block=self.spec) if self.phase is Phase.CALIBRATE else Compress(block=self.spec)


@dataclass(slots=True)
class BlockState:
    """One block. spec: known when its inputs are. record: when it is done. outputs: hidden states behind it, when known;
    present: whether their bytes are there. needed: whether its first half must run for a block behind it."""

    spec: BlockSpec | None = None
    record: BlockRecord | None = None
    reused: bool = False
    outputs: tuple[Blob, ...] | None = None
    present: bool = False
    needed: bool = False
    running: Phase | None = None
    forwarded: bool = False
    holder: int | None = None


SpecOf = Callable[[int, tuple[Blob, ...]], BlockSpec]
"""Index and inputs -> the block's task."""


@dataclass(slots=True)
class Chain:
    """All blocks of a job. `open` looks up what is finished; then `assign` and `settle` until `done`."""

    spec_of: SpecOf
    first: tuple[Blob, ...]
    count: int
    propagate: str
    has: Callable[[Blob], bool]
    placement: Placement = field(default_factory=Placement)
    blocks: list[BlockState] = field(default_factory=list)

    @classmethod
    def open(cls, workspace: Workspace, spec_of: SpecOf, first: tuple[Blob, ...], count: int, propagate: str) -> Chain:
        """Follows the chain of records as far as it goes: a block is done when its record and its bytes are there."""
        chain = cls(spec_of, first, count, propagate, workspace.has, blocks=[BlockState() for _ in range(count)])
        inputs: tuple[Blob, ...] | None = first
        for index, state in enumerate(chain.blocks):
            if inputs is None:
                break
            spec = state.spec = spec_of(index, inputs)
            record = workspace.lookup(COMPRESS, spec.key(), BlockRecord)
            if record is not None and _stored(workspace, record):
                state.record, state.reused = record, True
            state.outputs = _known_outputs(workspace, spec, record, propagate)
            state.present = state.outputs is not None and all(workspace.has(blob) for blob in state.outputs)
            inputs = state.outputs
        chain._mark_needed()
        return chain

    @property
    def done(self) -> bool:
        """Whether every block has its record."""
        return all(state.record is not None for state in self.blocks)

    @property
    def records(self) -> list[BlockRecord]:
        """The records, in block order; call when `done`."""
        return [state.record for state in self.blocks if state.record is not None]

    @property
    def discardable(self) -> list[Blob]:
        """Every blob of hidden states that can be made again: all but the embedding's output, from which a job that
        shares this chain, and runs now, finds its way when the others are gone."""
        known = [state.outputs for state in self.blocks if state.outputs is not None]
        return [blob for outputs in known for blob in outputs]

    def assign(self, worker: int) -> Link | None:
        """The next piece of work for an idle worker, now counted as running; None when there is none for it."""
        held: dict[int, int] = {}
        orphans: list[int] = []
        starts: list[int] = []
        for index, state in enumerate(self.blocks):
            if state.running is not None or state.spec is None:
                continue
            if state.record is None and state.holder is not None:
                held[index] = state.holder
            elif state.record is None and state.forwarded and self._inputs_present(index):
                orphans.append(index)
            elif state.needed and self._inputs_present(index):
                starts.append(index)
        chosen = self.placement.choose(worker, held, orphans, starts)
        if chosen is None:
            return None
        state = self.blocks[chosen]
        first_half = self.propagate == "original" and chosen in starts
        state.running = Phase.CALIBRATE if first_half else Phase.COMPRESS
        assert state.spec is not None
        return Link(state.running, state.spec)

    def settle(self, link: Link, worker: int, value: HiddenRecord | BlockRecord | None) -> None:
        """A piece of work came back with its record, or with None: to be done again."""
        index = link.spec.index
        state = self.blocks[index]
        state.running = None
        if value is None:
            state.holder = None  # a worker lets go of a block's statistics when it begins to solve
            self._look_again(index)
            return
        if isinstance(value, HiddenRecord):
            state.forwarded, state.needed = True, False
            state.holder = worker if state.record is None else None
            self._set_outputs(index, value.outputs)
        else:
            state.record, state.holder = value, None
            if self.propagate == "compressed":
                state.needed = False
                self._set_outputs(index, value.outputs)

    def lost(self, worker: int) -> None:
        """A worker's process died: what it held in memory is gone, what was committed is not."""
        for state in self.blocks:
            if state.holder == worker:
                state.holder = None

    def _inputs_present(self, index: int) -> bool:
        return index == 0 or self.blocks[index - 1].present

    def _look_again(self, index: int) -> None:
        """After a failure: hidden states may be gone, discarded by a job that shares them and has been published. Then
        the first halves that made them must run again, back to the first whose own inputs are there."""
        for state in reversed(self.blocks[:index]):
            if state.outputs is not None and all(self.has(blob) for blob in state.outputs):
                return
            state.present, state.forwarded, state.needed = False, False, True

    def _set_outputs(self, index: int, outputs: tuple[Blob, ...]) -> None:
        state = self.blocks[index]
        state.outputs, state.present = outputs, True
        if index + 1 < self.count and self.blocks[index + 1].spec is None:
            self.blocks[index + 1].spec = self.spec_of(index + 1, outputs)
            self.blocks[index + 1].needed = True

    def _mark_needed(self) -> None:
        """From the last block back: a first half must run when its block is not done, or when a block behind it must run
        and the hidden states between them are gone (they are discarded when a job has been published)."""
        behind = False
        for state in reversed(self.blocks):
            state.needed = state.record is None or (behind and not state.present)
            behind = state.needed


def _known_outputs(
    workspace: Workspace, spec: BlockSpec, record: BlockRecord | None, propagate: str
) -> tuple[Blob, ...] | None:
    if propagate == "compressed":
        return None if record is None else record.outputs
    found = workspace.lookup(CALIBRATE, spec.calibrate_key(), HiddenRecord)
    return None if found is None else found.outputs


def _stored(workspace: Workspace, record: BlockRecord) -> bool:
    return all(workspace.has(blob) for blob in record.stored)


def errors_of(record: BlockRecord) -> Mapping[str, float | None]:
    """The block's mean relative output errors, before and after compensation, for the progress display."""

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "error_quantized": mean([m.error_quantized for m in record.modules if m.error_quantized is not None]),
        "error_compensated": mean([m.error_compensated for m in record.modules if m.error_compensated is not None]),
    }
