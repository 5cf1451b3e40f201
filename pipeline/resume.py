"""What earlier runs have finished in an output, and why a run cannot take it over.

A block is looked up by its key, which tells nothing: another key may stand for other weights or for another version of torch.
So a block's record says what it was made from, and each block that is not reused is compared with the record that comes
nearest to it. A run knows everything but hidden states that nobody has made yet; a plan knows the manifest and headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

from pydantic import BaseModel, Field, ValidationError

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.plan import Plan
from counterweight.workers.errors import ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage import ObjectStore, open_store
from counterweight.workers.tasks.block import COMPRESS, BlockSpec
from counterweight.workers.tasks.made_from import ALONE, INPUTS, change, differing, made_from
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.workspace import COMMITS

RECORDS_PER_BLOCK = 4
"""Of the records of finished blocks, the newest so many times the model's blocks are read."""

REQUESTS = 16
"""Requests under way at once."""

UNFINISHED = "not finished before"
UNKNOWN = "finished before, by a version that did not keep what a block is made from"
GONE = "finished before, and what was stored of it is gone"
WAITS = f"finished before as far as is known now: the {INPUTS} are not yet"


def setting_of(job: CompressionJob, source: ModelSource, device: str, run: str = "", room: int = 0) -> Setting:
    """What all tasks of a job share. device: the kind that workers compute on. run, room: see `Setting`."""
    return Setting(
        source=source.uri,
        config=source.checkpoint.config,
        workspace=job.spec.output.uri,
        compute_dtype=job.spec.calibration.compute_dtype,
        device="cuda" if device == "cuda" else "cpu",
        rotation=job.spec.recipe.rotation,
        parameters=source.parameters,
        run=run,
        room=room,
    )


def outlines(
    job: CompressionJob,
    source: ModelSource,
    plan: Plan,
    setting: Setting,
    digests: Mapping[str, str],
    tokens: str,
    unseen: int | None = None,
) -> list[BlockSpec]:
    """Each block as it is known before anything has run: without hidden states, and with budgets in the place of ranks.
    plan: of the job, which has resolved its recipe; digests: source tensor -> sha256, or empty; tokens: sha256, or empty;
    unseen: windows that are held out, None for as many as the manifest asks for."""
    calibration = job.spec.calibration
    unseen = calibration.held_out_sequences if unseen is None else unseen
    together = shard_sequences(calibration.sequence_length)
    solved = -(-calibration.sequences // together)
    return [
        BlockSpec(
            setting=setting,
            index=block.index,
            tensors={name: digests[name] for name in source.block_tensors(block.index)} if digests else {},
            inputs=(),
            recipe=block.recipe,
            propagate=calibration.propagated,
            since=calibration.segment_start(block.index),
            experts=calibration.experts_among(block.recipe),
            tokens=tokens,
            passes=block.passes,
            batch_bytes=block.batch_bytes,
            drawn_from=solved if calibration.drawn else None,
            held_out_from=solved - (-calibration.drawn // together) if unseen else None,
            flops=block.flops,
            bytes=block.source_bytes,
        )
        for block in plan.blocks
    ]


def parts_of(spec: BlockSpec) -> dict[str, str]:
    """What the block would be made from; without what a budget still decides."""
    parts = made_from(spec)
    if any(part.budget_bits is not None for part in spec.recipe.values()):
        del parts["recipe.compensation"]
    return parts


class Finished(BaseModel):
    """What a record of a finished block says of it."""

    index: int
    made_from: Mapping[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Earlier:
    """Blocks that earlier runs have finished, newest first."""

    finished: Sequence[Finished]

    @classmethod
    def of(cls, store: ObjectStore, blocks: int) -> Earlier:
        """Those in an output, for a model of so many blocks; only read, so that a prune is not kept from them. StorageError."""
        found = sorted(store.list(f"{COMMITS}/{COMPRESS}/"), key=lambda info: info.modified, reverse=True)
        keys = [info.key for info in found[: RECORDS_PER_BLOCK * blocks]]
        with ThreadPoolExecutor(REQUESTS, "resume") as threads:
            read = [one for one in threads.map(lambda key: _read(store, key), keys) if one is not None]
        return cls([one for one in read if ALONE not in one.made_from])

    def reasons(self, wanted: Mapping[int, Mapping[str, str]], *, alike: str = WAITS) -> list[str]:
        """Why these blocks are not reused, one line for each kind of difference. wanted: block -> what it would be made from.
        alike: said of blocks that differ in nothing that is known."""
        told = _Reasons()
        for index, parts in sorted(wanted.items()):
            same = [one.made_from for one in self.finished if one.index == index]
            known = [before for before in same if before]
            if not known:
                told.add(UNKNOWN if same else UNFINISHED, index)
                continue
            nearest = min(known, key=lambda before: len(differing(before, parts)))
            found = differing(nearest, parts)
            for part in found:
                told.add(change(part, nearest[part], parts[part]), index)
            if not found:
                told.add(alike if INPUTS not in parts else GONE, index)
        return list(told.lines())


@dataclass(frozen=True)
class _Reasons:
    """Reason -> blocks."""

    blocks: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, index: int) -> None:
        self.blocks.setdefault(reason, []).append(index)

    def lines(self) -> Iterator[str]:
        for reason, indices in self.blocks.items():
            yield f"{blocks_text(indices)}: {reason}"


def _read(store: ObjectStore, key: str) -> Finished | None:
    """None for a record that is gone by now, and for one that is damaged: whoever needs it is told by the look-up."""
    try:
        return Finished.model_validate_json(store.read(key))
    except (ObjectNotFoundError, ValidationError):
        return None


def blocks_text(indices: Sequence[int]) -> str:
    """Blocks in order, as people name them: `block 3`, `blocks 0 to 3, 7`."""
    spans: list[str] = []
    for _, span in groupby(enumerate(indices), key=lambda item: item[1] - item[0]):
        numbers = [index for _, index in span]
        spans.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}")
    return f"block{'s' if len(indices) > 1 else ''} {', '.join(spans)}"


def foreseen(job: CompressionJob, source: ModelSource, plan: Plan) -> list[str]:
    """What a plan can say: of weights, calibration tokens and hidden states it knows nothing. RequestError for an output that
    there is not."""
    try:
        earlier = Earlier.of(open_store(job.spec.output.uri, waits=False), source.layout.blocks)
    except RequestError as error:
        raise RequestError(f"spec.output.uri: {error}") from error
    except StorageError as error:
        return [f"not known: {error}"]
    if not earlier.finished:
        return ["nothing: no block was finished before"]
    setting = setting_of(job, source, "cuda" if job.spec.resources.gpus_per_worker > 0 else "cpu")
    wanted = {spec.index: parts_of(spec) for spec in outlines(job, source, plan, setting, {}, "")}
    alike = "finished before, and reused where weights and calibration tokens are the same"
    return earlier.reasons(wanted, alike=alike)
