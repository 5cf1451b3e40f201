"""The graph of a job's tasks: what can run now and where, and what a resumed job need not do again.

A node is a task with what it depends on: values (records of other tasks), hidden states that lie in the store, statistics in
a worker's memory. The graph holds what is known of each node; `assign`, `settle` and `lost` are the only transitions. It
starts nothing and waits for nothing, so it can be tested without a worker.

Hidden states are discarded when a job that shares them has been published. A node is therefore needed when it has no value,
and again when a node that is needed reads hidden states of it that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from counterweight.pipeline.needs import Needs
from counterweight.pipeline.policies import Placement
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob, Record, Workspace

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


@dataclass(slots=True, eq=False, kw_only=True)
class Node(Generic[R_co]):
    """A task and where it stands. What is above the line is given, what is below is the graph's to change.

    make: the task, called when all of `reads`, `rereads` and `after` have values. reads: nodes whose hidden states enter it.
    after: nodes whose values it is made from. uses: the node whose statistics it works on, in the memory of that node's
    worker. rereads: nodes whose hidden states enter it too where no worker holds these statistics. lasting: whether the hidden
    states that it makes are written to the store; otherwise they are in memory, as far as there is room, and gone with its
    worker. makes: whether it makes the hidden states that its value names, and no other node does. wanted: whether it is run
    for its own sake, and not only for those that depend on it. bytes: what it leaves in its worker's memory until those that
    use it are done. before: a node that uses up the same statistics and therefore waits for this one, which leaves them as they
    are: work for another job, done only where that node is to run, and left where it fails. soon: whether it
    begins before those that were added before it, because it takes longer than they do.
    """

    make: Callable[[], Task[R_co]]
    reads: Sequence[Node[object]] = ()
    after: Sequence[Node[object]] = ()
    uses: Node[object] | None = None
    rereads: Sequence[Node[object]] = ()
    lasting: bool = True
    makes: bool = True
    wanted: bool = True
    bytes: int = 0
    before: Node[object] | None = None
    soon: bool = False
    # -----
    place: int
    """Position in the graph: those that it depends on come before it."""
    stream: int
    """Place of the first of the nodes that hand statistics on to each other up to this one: one of them runs at a time."""
    task: Task[R_co] | None = None
    found: R_co | None = None
    """Its value, once it has one."""
    done: bool = False
    reused: bool = False
    """Whether the value was found when the job was opened."""
    present: bool = False
    """Whether its hidden states are in the store or in memory, as far as is known."""
    keeper: int | None = None
    """The worker that has them in memory, where they may be nowhere else."""
    ran: bool = False
    """Whether it was run by this job."""
    running: bool = False
    waits: int = 0
    """How many of the nodes that the task is made from have no value yet."""
    holder: int | None = None
    """The worker that holds its statistics."""
    readers: list[Node[object]] = field(default_factory=list)
    rereaders: list[Node[object]] = field(default_factory=list)
    followers: list[Node[object]] = field(default_factory=list)
    users: list[Node[object]] = field(default_factory=list)

    @property
    def value(self) -> R_co:
        """What the task gave back; ValueError before it did."""
        if not self.done:
            raise ValueError(f"node {self.place}: has no value yet: expected one that is done")
        return self.found  # type: ignore[return-value]

    @property
    def known(self) -> bool:
        """Whether everything that the task is made from has a value."""
        return self.waits == 0

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        """Blobs of hidden states that it has made."""
        return self.found.hidden_states if isinstance(self.found, Record) else ()

    @property
    def in_memory(self) -> bool:
        """Whether a worker holds what it works on, so that nothing has to be read."""
        return self.uses is not None and self.uses.holder is not None

    @property
    def unfinished(self) -> bool:
        """Whether its worker holds statistics that a further node is to add to."""
        return self.holder is not None and any(user.users and not user.done for user in self.users)

    def made(self) -> Task[R_co]:
        """The task; call when `known`."""
        if self.task is None:
            self.task = self.make()
        return self.task


def giving(task: Task[R]) -> Callable[[], Task[R]]:
    """A node's `make` for a task that there is already."""
    return lambda: task


class Graph:
    """All tasks of a job. workspace: where results and hidden states lie; hold_bytes: of statistics that a worker holds beside
    those that it works on."""

    def __init__(
        self,
        workspace: Workspace | None = None,
        placement: Placement | None = None,
        hold_bytes: int = HOLD_BYTES,
    ) -> None:
        self.nodes: list[Node[object]] = []
        self._workspace = workspace
        self._placement = placement or Placement()
        self._hold_bytes = hold_bytes
        self._needs = Needs(self.nodes)
        self._unread: list[Blob] = []
        self._running: dict[int, Node[object]] = {}
        """By their places."""
        self._held: dict[int, dict[int, Node[object]]] = {}
        """Worker -> nodes whose statistics it holds, by their places."""

    def add(
        self,
        make: Callable[[], Task[R]],
        *,
        reads: Sequence[Node[object]] = (),
        after: Sequence[Node[object]] = (),
        uses: Node[object] | None = None,
        rereads: Sequence[Node[object]] = (),
        lasting: bool = True,
        makes: bool = True,
        wanted: bool = True,
        bytes: int = 0,
        before: Node[object] | None = None,
        soon: bool = False,
    ) -> Node[R]:
        """A further node, behind those that it depends on; see `Node`."""
        node = Node(
            make=make,
            reads=reads,
            after=after,
            uses=uses,
            rereads=rereads,
            lasting=lasting,
            makes=makes,
            wanted=wanted,
            bytes=bytes,
            before=before,
            soon=soon,
            place=len(self.nodes),
            stream=len(self.nodes) if uses is None else uses.stream,
        )
        self.nodes.append(node)
        self._needs.forget()
        for other in reads:
            other.readers.append(node)
        for other in rereads:
            other.rereaders.append(node)
        for other in after:
            other.followers.append(node)
        if uses is not None:
            uses.users.append(node)
        node.waits = sum(not other.done for other in (*reads, *rereads, *after))
        return node

    @property
    def busy(self) -> int:
        """How many workers run something, or wait for more of what they hold."""
        held = (node for own in self._held.values() for node in own.values() if node.unfinished)
        return len({node.stream for node in (*self._running.values(), *held)})

    def open(self) -> None:
        """Looks up what earlier jobs have finished, as far as keys are known: behind a gap they are not."""
        if self._workspace is None:
            raise ValueError("workspace: none: expected the one that results are looked up in")
        for node in self.nodes:
            if not node.done and node.known:
                self._look_up(node, self._workspace)

    def assign(self, worker: int) -> Node[object] | None:
        """The next node for an idle worker, now counted as running; None when there is none for it."""
        needed = self._needs.places
        streams = {node.stream for node in self._running.values()}
        held: dict[int, int] = {}
        orphans: list[int] = []
        starts: list[int] = []
        for place in self._needs.known:
            node = self.nodes[place]
            before = node.uses
            if before is not None and before.holder is None and before.place in needed:
                continue  # most of those that are known wait for the stretch before
            if node.stream in streams:
                continue
            if before is None and not (node.reads or node.rereads):
                starts.append(place)  # a job has hundreds that wait for nothing
                continue
            if not self._ready(node, needed) or self._spared(node, needed):
                continue
            if node.uses is None:
                starts.append(node.place)
            elif node.uses.holder is None:
                orphans.append(node.place)
            else:
                held[node.place] = node.uses.holder
        if self._busy(worker):
            starts = []
        starts = [place for place in starts if self.nodes[place].soon] or starts
        chosen = self._placement.choose(worker, held, orphans, starts)
        if chosen is None:
            return None
        node = self.nodes[chosen]
        node.running = True
        if node.done:
            node.task = None  # made again, from what is known by now: its hidden states alone may be wanted
        self._running[node.place] = node
        return node

    def settle(self, node: Node[R], worker: int, value: R) -> None:
        """A node's task came back with its value."""
        self._stopped(node)
        self._finish(node, value)
        node.ran, node.present = True, True
        node.keeper = worker if node.makes else None
        self._needs.settled(node)
        if node.uses is not None:
            self._hold(node.uses, worker)
        self._hold(node, worker)
        self._let_forget(node, *node.reads, *node.rereads)

    def unread(self) -> list[Blob]:
        """Hidden states that no node reads any more, each named once: no worker need keep them in memory."""
        found, self._unread = self._unread, []
        return found

    def failed(self, node: Node[object], *, gone: bool = False) -> None:
        """A node's task came back without a value and is to be done again. What it worked on is in no memory any more, and
        what it reads may be gone from the store: perhaps because another job has finished it. gone: something that it reads
        is, from memory too."""
        self._stopped(node)
        if node.uses is not None:
            self._let_go(node.uses)
        self._look_again(node, gone=gone)
        if self._workspace is not None and not node.done:
            self._look_up(node, self._workspace)
        self._needs.forget()
        self._let_forget(*node.reads, *node.rereads)

    def leave(self, node: Node[object]) -> None:
        """A node that another job would like to have failed for good: it is not done here."""
        node.wanted = False
        self.failed(node)

    def discard(self, nodes: Iterable[Node[object]]) -> None:
        """Deletes hidden states that no node has to read any more."""
        for node in nodes:
            if node.present and self._workspace is not None:
                self._workspace.discard(*node.hidden_states)
            node.present, node.keeper = False, None
        self._needs.forget()

    def lost(self, worker: int) -> None:
        """A worker's process died: what it held in memory is gone, what was committed is not."""
        for node in list(self._held.get(worker, {}).values()):
            self._let_go(node)
        for node in self.nodes:
            if node.keeper == worker:
                node.keeper = None
                node.present = node.lasting or self._there(node)
        self._needs.forget()

    def _let_forget(self, *nodes: Node[object]) -> None:
        """Where nobody is to read their hidden states any more, they need not be in memory."""
        for node in nodes:
            readers = (*node.readers, *node.rereaders)
            if node.keeper is None or any(reader.place in self._needs.places for reader in readers):
                continue
            self._unread += node.hidden_states
            node.keeper, node.present = None, node.lasting

    def _stopped(self, node: Node[object]) -> None:
        node.running = False
        self._running.pop(node.place, None)

    def _let_go(self, node: Node[object]) -> None:
        """Nobody holds the node's statistics any more."""
        if node.holder is not None:
            del self._held[node.holder][node.place]
            node.holder = None
            self._needs.let_go(node)

    def _look_up(self, node: Node[object], workspace: Workspace) -> None:
        found = node.made().lookup(workspace)
        if found is not None:
            self._finish(node, found)
            self._needs.forget()
            node.reused, node.present = True, self._there(node)

    def _finish(self, node: Node[R], value: R) -> None:
        if not node.done:
            for other in (*node.readers, *node.rereaders, *node.followers):
                other.waits -= 1
        node.found, node.done = value, True

    def _busy(self, worker: int) -> bool:
        """Whether a worker that nothing is given to is waiting for more of what it works on. When nothing runs anywhere, there
        is nothing to wait for."""
        return bool(self._running) and any(node.unfinished for node in self._held.get(worker, {}).values())

    def needed(self) -> set[int]:
        """Places of the nodes that have to run."""
        return self._needs.places

    def _ready(self, node: Node[object], needed: set[int]) -> bool:
        """Whether a needed node can start. Statistics that a node waits for are used where they are held; where their holder
        died the node calibrates for itself, unless the calibration has to run again anyhow."""
        if not node.known:
            return False
        if node.uses is not None:
            if node.in_memory:
                return all(other.present for other in node.reads)
            if node.uses.place in needed:
                return False
        return all(other.present for other in (*node.reads, *node.rereads))

    def _spared(self, node: Node[object], needed: set[int]) -> bool:
        """Whether others work on the same statistics first, because this one uses them up."""
        return node.uses is not None and any(user.before is node and user.place in needed for user in node.uses.users)

    def _hold(self, node: Node[object], worker: int) -> None:
        """Statistics are with a worker as long as a user is not done; the oldest of its others go when they are too many, as
        `HeldBlocks` lets them go."""
        if all(user.done for user in node.users):
            self._let_go(node)
            return
        if node.holder == worker:
            return
        self._let_go(node)
        held = self._held.setdefault(worker, {})
        others = [other for _, other in sorted(held.items())]
        node.holder = worker
        held[node.place] = node
        self._needs.held(node)
        for other in others:
            if not other.bytes:
                self._let_go(other)  # a worker drops what it is not told to keep when it begins another block
        others = [other for other in others if other.bytes]
        total = sum(other.bytes for other in others)
        for other in others:
            if total <= self._hold_bytes:
                break
            self._let_go(other)
            total -= other.bytes

    def _look_again(self, node: Node[object], *, gone: bool = False) -> None:
        """After a failure: which of the hidden states behind it are still there, back to the first that are. gone: not all of
        those that it reads are."""
        for other in (*node.reads, *node.rereads):
            if other.done and other.present:
                if gone and other.keeper is not None:
                    self._unread += other.hidden_states
                    other.keeper = None
                other.present = self._there(other)
            if not other.present:
                self._look_again(other)

    def _there(self, node: Node[object]) -> bool:
        workspace = self._workspace
        kept = node.keeper is not None and not node.lasting
        return kept or workspace is None or all(workspace.has(blob) for blob in node.hidden_states)
