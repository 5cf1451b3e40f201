"""Which nodes of a graph have to run. Kept up to date while they settle: a job on many shards has thousands of nodes, and is to
be looked at after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.pipeline.graph import Node


class Needs:
    """A node is needed when it has no value, and again when a node that is needed reads hidden states of it that are gone.

    nodes: of the graph, which may still grow; none depends on a later one. Whoever changes a node says so: `settled`, `held`
    and `let_go` for what happens all the time, `forget` for everything else, after which all nodes are looked at again.
    """

    def __init__(self, nodes: Sequence[Node[object]]) -> None:
        self._nodes = nodes
        self._places: set[int] | None = None
        self._known: set[int] = set()

    @property
    def places(self) -> set[int]:
        """Of all that are needed."""
        if self._places is None:
            self._places = set()
            for node in reversed(self._nodes):
                if _needed(node, self._places):
                    self._places.add(node.place)
            self._known = {place for place in self._places if self._nodes[place].known}
        return self._places

    @property
    def known(self) -> set[int]:
        """Of those that are needed and whose tasks can be made."""
        return self._known if self.places else set()

    def forget(self) -> None:
        """Anything may have changed."""
        self._places = None

    def settled(self, node: Node[object]) -> None:
        """The node has run, and what it has made is there."""
        if self._places is None:
            return
        self._drop(node)
        for other in chain(node.readers, node.rereaders, node.followers):
            if other.known and other.place in self._places:
                self._known.add(other.place)

    def held(self, node: Node[object]) -> None:
        """A worker holds the node's statistics, so that its users read less."""
        for user in node.users:
            self._look_at(user.rereads)

    def let_go(self, node: Node[object]) -> None:
        """No worker holds the node's statistics any more."""
        if self._places is not None and any(user.place in self._places for user in node.users):
            self.forget()

    def _drop(self, node: Node[object]) -> None:
        if self._places is None:
            return
        self._places.discard(node.place)
        self._known.discard(node.place)
        self._look_at(chain(node.reads, node.rereads, node.after, () if node.uses is None else (node.uses,)))

    def _look_at(self, nodes: chain[Node[object]] | Sequence[Node[object]]) -> None:
        """Which of these were needed, and are no longer."""
        for node in nodes:
            if self._places is not None and node.place in self._places and not _needed(node, self._places):
                self._drop(node)


def _needed(node: Node[object], needed: set[int]) -> bool:
    """Whether a node is, given which of those behind it are."""
    return (
        (node.wanted and not node.done and (node.before is None or not node.before.done))
        or (not node.done and any(other.place in needed for other in node.followers))
        or (not node.ran and any(other.place in needed for other in node.users))
        or (not node.present and any(other.place in needed for other in node.readers))
        or (not node.present and any(o.place in needed and not o.in_memory for o in node.rereaders))
    )
