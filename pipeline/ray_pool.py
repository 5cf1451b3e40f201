"""Worker processes under Ray: start them, hand them tasks, notice when they die or fall silent.

One long-lived actor per worker (a GPU task would otherwise start a process per task). Ray retries nothing for us: what to do
about a failed task is the orchestrator's policy; a process that is gone is replaced here. Actors that find no place wait for
one, on a node that comes back or that an autoscaler adds, while the job goes on with the others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from counterweight.pipeline.admission import Node, resources, shared_bytes, shortage
from counterweight.pipeline.awake import Awake
from counterweight.pipeline.cluster import Head
from counterweight.pipeline.passing import Kept, References
from counterweight.pipeline.pool import START_SECONDS, STARTS, Outcome, PoolSize
from counterweight.pipeline.ray_worker import WorkerActor
from counterweight.workers.errors import CounterweightError, WorkerError
from counterweight.workers.identity import Identity, Token, WorkerReport
from counterweight.workers.process import Done

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from counterweight.pipeline.ray_worker import Reference
    from counterweight.workers.tasks.task import Task
    from counterweight.workers.workspace import Blob

PULSE_SECONDS = 3.0
"""Between questions to a busy worker whether it is still there."""

SILENT_SECONDS = 15.0
"""Without an answer to such a question, after which a worker's task is given to another: a host that is frozen is noticed by
nobody else."""

LATE_SECONDS = 1.0
"""That an answer may take which has arrived in this process already: it may have been stopped itself."""


class State(Enum):
    """Of a worker."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    SILENT = "silent"
    """Busy, and its task was given to another."""
    LOST = "lost"
    """Given up."""

    @property
    def works(self) -> bool:
        """Whether it can be counted on."""
        return self in (State.IDLE, State.BUSY)


@dataclass(slots=True)
class Seat:
    """A worker's place in the pool. actor: the process that has it now. answer: what is awaited of it: who it is, or the task
    with this ticket. pulse: a question that is not answered yet; asked: when. heard: when one was answered last."""

    actor: ActorHandle
    answer: object
    state: State = State.STARTING
    ticket: int = 0
    pulse: object = None
    asked: float = 0.0
    heard: float = 0.0
    since: float = 0.0
    """When it became idle."""
    deaths: int = 0
    """Processes in a row that died before their first answer."""
    report: WorkerReport | None = None
    cause: str = ""
    """Why the last process was lost."""
    waits: str = ""
    """What it last said that it waits for."""

    @property
    def place(self) -> str:
        return "" if self.report is None else f" on {self.report.place}"


class RayPool:
    """Workers as Ray actors. Create inside `cluster(...)`.

    token: what every worker has to find in the job's storage. expected: what code and libraries it has to have; None: any.
    note: told, in a line, of workers that are late, lost or back. clock: seconds, never going back.
    """

    def __init__(
        self,
        size: PoolSize,
        *,
        token: Token | None = None,
        expected: Identity | None = None,
        note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import ray

        self._ray = ray
        # Two threads: one for the task, one that says that the process is there.
        self._class = ray.remote(WorkerActor).options(
            num_cpus=size.cpus, num_gpus=size.gpus, max_restarts=0, max_task_retries=0, max_concurrency=2
        )
        self._size, self._token, self._expected, self._note = size, token, expected, note
        self._clock = Awake(clock)
        self.size, self.threads = size.workers, 1 if size.gpus else size.cpus
        if missing := shortage(self._nodes(), size):
            note(missing)
        self._shares = size.workers > 1
        self.room = shared_bytes(self._nodes(), size) if self._shares else None
        self._references: References[Reference] = References()
        self._unread: list[Blob] = []
        self._seats = [self._fresh() for _ in range(size.workers)]
        self._tickets = 0
        self._alone = self._clock()
        """Since when no worker can be counted on."""
        self._head = Head(ray, self._clock)

    def first(self) -> WorkerReport:
        """Who the first worker is that answers; WorkerError when none does in time."""
        while True:
            for seat in self._seats:
                if seat.report is not None:
                    return seat.report
            self.wait(PULSE_SECONDS)

    def idle(self) -> list[int]:
        found = [worker for worker, seat in enumerate(self._seats) if seat.state is State.IDLE]
        return sorted(found, key=lambda worker: self._seats[worker].since)

    def submit(self, worker: int, task: Task[object]) -> int:
        seat = self._seats[worker]
        if seat.state is not State.IDLE:
            raise ValueError(f"worker {worker}: is {seat.state.value}: expected an idle one")
        self._tickets += 1
        seat.answer = seat.actor.run_given.remote(task, self._unread, self._references.given(worker, task))
        seat.ticket, seat.state = self._tickets, State.BUSY
        self._unread = []
        seat.heard = self._clock()
        return self._tickets

    def wait(self, seconds: float) -> list[Outcome]:
        self._head.check()
        outcomes = self._silences()
        self._ask()
        awaited = {seat.answer: worker for worker, seat in enumerate(self._seats) if seat.answer is not None}
        awaited |= {seat.pulse: worker for worker, seat in enumerate(self._seats) if seat.pulse is not None}
        if not awaited:
            self._give_up()
            return outcomes
        done = self._received(list(awaited), 0.0 if outcomes else seconds)
        for reference in done:
            worker = awaited[reference]
            seat = self._seats[worker]
            if reference == seat.pulse:
                seat.pulse = None
                self._heard(worker, reference)
            elif seat.state is State.STARTING:
                self._joined(worker, reference)
            else:
                outcomes += self._outcome(worker, reference)
        self._give_up()
        return outcomes

    def forget(self, unread: Sequence[Blob]) -> None:
        if self._shares:
            self._references.forget(unread)
        else:
            self._unread += unread

    def close(self) -> None:
        for seat in self._seats:
            self._ray.kill(seat.actor)

    def _fresh(self) -> Seat:
        actor = self._class.remote(self._size.device, self._size.cpus, self._shares)
        return Seat(actor=actor, answer=actor.ready.remote(self._token))

    def _received(self, references: list[object], seconds: float) -> list[object]:
        try:
            done, _ = self._ray.wait(references, num_returns=1, timeout=seconds)
        except (ConnectionError, self._ray.exceptions.RayError) as error:
            raise WorkerError(f"the connection to Ray is lost: {_line(error)}") from error
        return list(done)

    def _joined(self, worker: int, reference: object) -> None:
        """A process has answered for the first time, or died before it did. Refuses who would compute other bits, or would not
        find what others have stored."""
        seat = self._seats[worker]
        try:
            report: WorkerReport = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(f"worker {worker} cannot start: {_cause(error)}") from error
        except self._ray.exceptions.RayError as error:
            self._replace(worker, _line(error), deaths=seat.deaths + 1)
            return
        if report.storage:
            raise WorkerError(
                f"worker {worker} on {report.place} does not see the job's output: {report.storage}: expected storage that "
                "the driver and all workers share"
            )
        if self._expected is not None and (found := self._expected.differences(report.identity)):
            raise WorkerError(
                f"worker {worker} on {report.place} would compute other bits: it has {', '.join(found)}: expected the same "
                "on all nodes"
            )
        others = {seat.report.device for seat in self._seats if seat.report is not None}
        if others - {report.device}:
            raise WorkerError(
                f"worker {worker} on {report.place} computes on the {report.device}, others on the {', '.join(others)}: "
                "expected the same kind of device everywhere"
            )
        if seat.cause:
            self._note(f"worker {worker} is back, on {report.place}")
        seat.report, seat.deaths, seat.cause = report, 0, ""
        self._rest(seat)

    def _outcome(self, worker: int, reference: object) -> list[Outcome]:
        """What a task came to; nothing where it was given to another by now."""
        seat = self._seats[worker]
        ticket, forgotten = seat.ticket, seat.state is State.SILENT
        try:
            done, made = self._result(reference)
            outcome = Outcome(ticket, worker, value=done.value, traffic=done.traffic)
        except self._ray.exceptions.RayTaskError as error:
            made, outcome = {}, Outcome(ticket, worker, error=_raised(error))
        except self._ray.exceptions.RayError as error:  # the actor or its node is gone, or ran out of memory
            place = seat.place
            self._replace(worker, _line(error))
            died = WorkerError(f"worker {worker}{place} died: {_line(error)}")
            return [] if forgotten else [Outcome(ticket, worker, error=died, worker_died=True)]
        self._rest(seat)
        if forgotten:
            self._note(f"worker {worker}{seat.place} answers again")
            return []
        self._references.add(worker, made)
        return [outcome]

    def _result(self, reference: object) -> tuple[Done[object], Mapping[str, Kept[Reference]]]:
        found: tuple[Done[object], Mapping[str, Kept[Reference]]] = self._ray.get(reference)
        return found

    def _rest(self, seat: Seat) -> None:
        seat.answer, seat.state, seat.since = None, State.IDLE, self._clock()

    def _replace(self, worker: int, cause: str, *, deaths: int = 0) -> None:
        """Starts another process in the place of one that is gone; gives the worker up where these die before they answer."""
        self._ray.kill(self._seats[worker].actor)
        self._references.lost(worker)
        seat = self._fresh()
        seat.deaths, seat.cause = deaths, cause
        if deaths >= STARTS:
            self._ray.kill(seat.actor)
            seat.state, seat.answer = State.LOST, None
            self._note(f"worker {worker} is given up: {deaths} processes died before they answered: {cause}")
        self._seats[worker] = seat

    def _ask(self) -> None:
        """Busy workers whether they are there."""
        now = self._clock()
        for seat in self._seats:
            if seat.state in (State.BUSY, State.SILENT) and seat.pulse is None and now - seat.heard >= PULSE_SECONDS:
                seat.pulse, seat.asked = seat.actor.pulse.remote(), now

    def _heard(self, worker: int, reference: object) -> None:
        seat = self._seats[worker]
        try:
            waits: str = self._ray.get(reference)
        except self._ray.exceptions.RayError:
            return  # its task says so too
        seat.heard = self._clock()
        if waits and waits != seat.waits:
            self._note(f"worker {worker}: {waits}")
        seat.waits = waits

    def _silences(self) -> list[Outcome]:
        """Of busy workers that were asked long ago and have not answered. What counts is the time since the question: this
        process may have been busy itself, and asked nobody."""
        found = []
        now = self._clock()
        for worker, seat in enumerate(self._seats):
            if seat.state is not State.BUSY or seat.pulse is None or now - seat.asked <= SILENT_SECONDS:
                continue
            answered, _ = self._ray.wait([seat.pulse], timeout=LATE_SECONDS)
            if not answered:
                seat.state = State.SILENT
                self._references.lost(worker)
                error = WorkerError(f"worker {worker}{seat.place} has not answered for {SILENT_SECONDS:.0f} s")
                found.append(Outcome(seat.ticket, worker, error=error, worker_died=True))
        return found

    def _give_up(self) -> None:
        """WorkerError when there is no worker, and was none for long or cannot be one."""
        now = self._clock()
        if any(seat.state.works for seat in self._seats):
            self._alone = now
            return
        lost = all(seat.state is State.LOST for seat in self._seats)
        if not lost and now - self._alone <= START_SECONDS:
            return
        causes = {seat.cause for seat in self._seats if seat.cause}
        why = f": {'; '.join(sorted(causes))}" if causes else f": {resources(self._nodes(), self._size)}"
        raise WorkerError(f"none of {self.size} workers has answered for {now - self._alone:.0f} s{why}")

    def _nodes(self) -> list[Node]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


def _raised(error: BaseException) -> BaseException:
    """What a task raised, as it was raised."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, Exception):
        return error
    if not isinstance(cause, CounterweightError):
        cause.__cause__ = error  # a defect: where it was raised stands in Ray's text
    return cause


def _cause(error: BaseException) -> str:
    raised = _raised(error)
    return _line(raised) if isinstance(raised, CounterweightError) else f"{type(raised).__name__}: {_line(raised)}"


def _line(error: BaseException) -> str:
    """An error of Ray in one line: its first, and why a process ended where that is known."""
    text = str(error).strip()
    detail = re.search(r"exit detail: ([^.]*)", " ".join(text.split()))
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".:") + (f": {detail[1]}" if detail else "")
