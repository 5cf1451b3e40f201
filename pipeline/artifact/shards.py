"""Finished blocks as files of an artifact: each is copied under its name, and read again, by workers that have nothing else to
do while other blocks are still being made. What is joined from all of them is read again by several.

    compress k ──> copy k ──> check k        all compress ──> join ──> check, part 1 ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from counterweight.pipeline.artifact.reader import Artifact
from counterweight.pipeline.graph import Graph, Node, giving
from counterweight.pipeline.neighbours import TASK_BYTES, neighbours
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.files import Checksum, CheckTensors, Copy, Join
from counterweight.workers.tasks.pass_through import PassThroughRecord

Record = BlockRecord | PassThroughRecord
"""Of what becomes one file of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Shard:
    """copy: its file's node. check: the sha256 of what was read of it again."""

    copy: Node[Written]
    check: Node[str]


@dataclass(frozen=True, slots=True)
class Joined:
    """One file of tensors of all blocks. join: its node. checks: whether what was read of it again is right, part by part."""

    join: Node[Written]
    checks: tuple[Node[bool], ...]


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


def add_joined(graph: Graph, artifact: Artifact, join: Join, digests: Mapping[str, str]) -> Joined:
    """Nodes of a joined file. digests: of its tensors."""
    joined = graph.add(giving(join))
    checks = [
        CheckTensors(
            root=artifact.uri,
            path=join.path,
            tensors={name: digests[name] for place in part for name in join.parts[place][1]},
            count=sum(len(names) for _, names in join.parts),
            bytes=sum(join.parts[place][0].size for place in part),
            part=f"{part.start + 1} to {part.stop}",
        )
        for part in neighbours([blob.size for blob, _ in join.parts], TASK_BYTES)
    ]
    return Joined(joined, tuple(graph.add(giving(check), after=(joined,)) for check in checks))
