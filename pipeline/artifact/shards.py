"""Finished blocks as files of an artifact: each is copied under its name, and read again, by workers that have nothing else to
do while other blocks are still being made. What is joined from all of them is begun meanwhile, too, and read again by several.

    compress k ──> copy k ──> check k        all compress ──> join ──> check, part 1 ...
                                       all but the last ──> begin ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from counterweight.pipeline.artifact.reader import Artifact
from counterweight.pipeline.graph import Graph, Node, giving
from counterweight.pipeline.neighbours import TASK_BYTES, neighbours
from counterweight.workers.ledger import ADAPTER, RESIDUAL_STORE
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.files import Checksum, CheckTensors, Copy, Join
from counterweight.workers.tasks.pass_through import PassThroughRecord
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from counterweight.workers.join import Awaited, Part

WRITER_BYTES = 128 << 20
"""That a worker holds of a file which it has begun, about: parts on their way to S3."""

Record = BlockRecord | PassThroughRecord
"""Of what becomes one file of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Shard:
    """copy: its file's node. check: the sha256 of what was read of it again."""

    copy: Node[Written]
    check: Node[str]


@dataclass(frozen=True, slots=True)
class JoinedFile:
    """A file with tensors of all blocks. what: for people. wanted: whether a linear with this recipe has such tensors. of: a
    block's blob and the digests of its tensors; None without any."""

    path: str
    what: str
    wanted: Callable[[ModuleRecipe], bool]
    of: Callable[[BlockRecord], tuple[Blob | None, Mapping[str, str]]]

    def parts(self, records: Sequence[BlockRecord], blocks: int) -> tuple[list[Part], list[Awaited]]:
        """What is joined of these blocks, from the first, and what of the others up to `blocks`: they will be like the last of
        these that has any, as far as anybody knows yet."""
        found = [(record.index, *self.of(record)) for record in records]
        parts = [(index, blob, digests) for index, blob, digests in found if blob is not None]
        awaited: list[Awaited] = []
        for index, blob, digests in parts[-1:]:
            awaited = [
                (blob, {name: name.replace(f".{index}.", f".{other}.", 1) for name in digests})
                for other in range(len(records), blocks)
            ]
        return [(blob, digests) for _, blob, digests in parts], awaited


JOINED = (
    JoinedFile(
        ADAPTER,
        "adapter",
        lambda part: part.compensation.branch_rank is not None,
        lambda record: (record.adapter, record.factors),
    ),
    JoinedFile(
        RESIDUAL_STORE,
        "residual store",
        lambda part: part.residual is not None,
        lambda record: (record.residual, record.residuals),
    ),
)


def shard_paths(count: int) -> list[str]:
    """The checkpoint's files, in order, as transformers expects them."""
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def add_shards(
    graph: Graph, artifact: Artifact, records: Sequence[Callable[[], Record]], made: Sequence[Node[object]] = ()
) -> Mapping[str, Shard]:
    """Their nodes, by file. made: the nodes that make the records, each behind which its own can be asked for; none where all
    are there."""

    def copy(place: int, path: str) -> Copy:
        return Copy(root=artifact.store.uri, blob=records[place]().checkpoint, key=artifact.key(path))

    def check(path: str, copied: Node[Written]) -> Checksum:
        return Checksum(artifact.uri, path, copied.value.size)

    shards: dict[str, Shard] = {}
    for place, path in enumerate(shard_paths(len(records))):
        copied: Node[Written] = graph.add(partial(copy, place, path), after=made[place : place + 1])
        shards[path] = Shard(copied, graph.add(partial(check, path, copied), after=(copied,)))
    return shards


def begun_behind(blocks: int, workers: int, propagate: Literal["original", "compressed"]) -> list[int]:
    """Behind how many of so many blocks, from the first, a joined file is begun, and gone on with: where each worker has one
    left, and where two are, which take as long as a solve. Not at all by one worker, which is done with all blocks first, nor
    by workers that share each block, where all would wait for the one that joins."""
    if workers == 1 or propagate == "compressed":
        return []
    return sorted({stop for stop in (blocks - workers, blocks - 2) if stop > 0})


def add_join(
    graph: Graph,
    workspace: Workspace,
    artifact: Artifact,
    file: JoinedFile,
    records: Sequence[Callable[[], BlockRecord]],
    made: Sequence[Node[BlockRecord]] = (),
    stops: Sequence[int] = (),
) -> Node[Written | None]:
    """The node that joins a file of all blocks, behind those that begin it on the same worker. made: as for `add_shards`.
    stops: by `begun_behind`."""

    def join(stop: int) -> Join:
        parts, awaited = file.parts([record() for record in records[:stop]], len(records))
        return Join(
            workspace=workspace.store.uri,
            parts=parts,
            output=artifact.uri,
            path=file.path,
            what=file.what,
            awaited=awaited,
        )

    node: Node[Written | None] | None = None
    for stop in stops:
        node = graph.add(partial(join, stop), after=made[:stop], uses=node, bytes=WRITER_BYTES)
    return graph.add(partial(join, len(records)), after=made, uses=node)


def add_checks(
    graph: Graph, artifact: Artifact, file: JoinedFile, records: Sequence[BlockRecord], joined: Node[Written | None]
) -> list[Node[bool]]:
    """Nodes that say whether what is read of a joined file again is right, part by part."""
    parts, _ = file.parts(records, len(records))
    checks = [
        CheckTensors(
            root=artifact.uri,
            path=file.path,
            tensors={name: sha256 for place in some for name, sha256 in parts[place][1].items()},
            count=sum(len(digests) for _, digests in parts),
            bytes=sum(parts[place][0].size for place in some),
            part=f"{some.start + 1} to {some.stop}",
        )
        for some in neighbours([blob.size for blob, _ in parts], TASK_BYTES)
    ]
    return [graph.add(giving(check), after=(joined,)) for check in checks]
