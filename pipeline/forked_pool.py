"""Workers of this machine without Ray: processes that are forked from this one, and so need not import again what it has.

For jobs on CPUs alone. A worker is a process of its own still, whose death costs one try of one task. What Ray does beside has
no place here: other machines, GPUs, ending a worker before the machine's memory is full.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import IO, TYPE_CHECKING

from counterweight.pipeline.awake import Awake
from counterweight.pipeline.child import call_me, die_with
from counterweight.pipeline.pool import STARTS, Outcome, PoolSize
from counterweight.workers.errors import CounterweightError, WorkerError
from counterweight.workers.process import Done, WorkerProcess, import_computing

if TYPE_CHECKING:
    from counterweight.workers.identity import WorkerReport
    from counterweight.workers.tasks.task import Task
    from counterweight.workers.workspace import Blob

NAME = "worker"
"""What the kernel calls these processes."""

END_SECONDS = 5.0
"""That a process that was killed may take to be gone."""

LOOK_SECONDS = 1.0
"""Between two looks whether workers are stopped."""

STOPPED_SECONDS = 15.0
"""That a worker may be stopped (SIGSTOP) until it is ended, and its task given to another."""


@dataclass(frozen=True, slots=True)
class _Waits:
    """A worker's word on what its task waits for."""

    text: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """To a task, or who the worker is."""

    value: object = None
    error: BaseException | None = None


@dataclass(slots=True)
class Seat:
    """A worker's place in the pool. printed: what its process writes to stdout and stderr. ticket: of the task that it has, 0
    for none. since: when it became idle; 0 before its first answer. deaths: in a row, of processes that had not answered.
    ran: when it was last seen not to be stopped."""

    process: ForkProcess
    connection: Connection
    printed: IO[bytes]
    ticket: int = 0
    since: float = 0.0
    deaths: int = 0
    ran: float = 0.0

    @property
    def idle(self) -> bool:
        return self.since > 0 and self.ticket == 0


class ForkedPool:
    """Workers as forks. note: told, in a line, what a worker waits for, and of one that is ended. clock: seconds, never going
    back.

    Forked when the pool is made: this process should have no threads by then that hold locks.
    """

    def __init__(
        self,
        size: PoolSize,
        *,
        note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if size.gpus > 0:
            raise ValueError(f"gpus: {size.gpus}: expected 0: a process that uses a GPU cannot be forked")
        import_computing()  # so that no worker has to
        self._size, self._note = size, note
        self.size, self.threads = size.workers, size.cpus
        self._context = multiprocessing.get_context("fork")
        self._seats: list[Seat] = []
        self.room = None if size.workers == 1 else 0
        self._unread: list[Blob] = []
        self._report: WorkerReport | None = None
        self._tickets = 0
        self._awake, self._looked = Awake(clock), 0.0
        for _ in range(size.workers):
            self._seats.append(self._fresh())

    def first(self) -> WorkerReport:
        """Who the first worker is that answers; WorkerError when none does."""
        while self._report is None:
            self.wait(1.0)
        return self._report

    def idle(self) -> Sequence[int]:
        found = [worker for worker, seat in enumerate(self._seats) if seat.idle]
        return sorted(found, key=lambda worker: self._seats[worker].since)

    def submit(self, worker: int, task: Task[object]) -> int:
        seat = self._seats[worker]
        if not seat.idle:
            raise ValueError(f"worker {worker}: is starting or busy: expected an idle one")
        self._tickets += 1
        seat.ticket = self._tickets
        with suppress(BrokenPipeError):  # it has died; `wait` finds that out
            seat.connection.send((task, self._unread))
        self._unread = []
        return self._tickets

    def wait(self, seconds: float) -> list[Outcome]:
        self._end_stopped()
        awaited = {seat.connection: worker for worker, seat in enumerate(self._seats)}
        outcomes: list[Outcome] = []
        for connection in wait_for(list(awaited), timeout=seconds):
            assert isinstance(connection, Connection)
            worker = awaited[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                outcomes += self._died(worker)
                continue
            if isinstance(message, _Waits):
                self._note(f"worker {worker}: {message.text}")
            else:
                outcomes += self._answered(worker, message)
        return outcomes

    def forget(self, unread: Sequence[Blob]) -> None:
        self._unread += unread

    def close(self) -> None:
        for seat in self._seats:
            _end(seat)

    def _end_stopped(self) -> None:
        """Ends processes that have been stopped for `STOPPED_SECONDS` in which this one ran: nobody else would."""
        now = self._awake()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for worker, seat in enumerate(self._seats):
            if not _is_stopped(seat.process):
                seat.ran = now
            elif now - seat.ran > STOPPED_SECONDS:
                self._note(
                    f"worker {worker} (process {seat.process.pid}) was stopped for {STOPPED_SECONDS:.0f} s: it is ended"
                )
                seat.process.kill()

    def _fresh(self) -> Seat:
        ours, theirs = self._context.Pipe()
        printed = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        held = [ours, *(seat.connection for seat in self._seats)]
        arguments = (theirs, held, printed.fileno(), os.getpid(), self._size.cpus)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return Seat(process, ours, printed, ran=self._awake())

    def _answered(self, worker: int, answer: _Answer) -> list[Outcome]:
        seat = self._seats[worker]
        ticket, first = seat.ticket, seat.since == 0
        seat.ticket, seat.since = 0, time.monotonic()
        if not first:
            return [_outcome(ticket, worker, answer)]
        if answer.error is not None:
            raise WorkerError(f"worker {worker} cannot start: {answer.error}") from answer.error
        seat.deaths = 0
        self._report = answer.value  # type: ignore[assignment]
        return []

    def _died(self, worker: int) -> list[Outcome]:
        """Starts another process in the place of one that is gone. WorkerError where these die before they answer."""
        seat = self._seats[worker]
        _end(seat)
        cause = f"worker {worker} (process {seat.process.pid}) died: {_cause(seat)}"
        deaths = seat.deaths + 1 if seat.since == 0 else 0
        if deaths >= STARTS:
            raise WorkerError(f"{cause}: {deaths} processes in a row before they answered")
        self._seats[worker] = self._fresh()
        self._seats[worker].deaths = deaths
        return [Outcome(seat.ticket, worker, error=WorkerError(cause), worker_died=True)]


def _outcome(ticket: int, worker: int, answer: _Answer) -> Outcome:
    if answer.error is not None:
        return Outcome(ticket, worker, error=answer.error)
    assert isinstance(answer.value, Done)
    return Outcome(ticket, worker, value=answer.value.value, traffic=answer.value.traffic)


def _is_stopped(process: ForkProcess) -> bool:
    """Whether a signal has stopped it (not a debugger)."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _end(seat: Seat) -> None:
    seat.process.kill()
    seat.process.join(END_SECONDS)
    seat.connection.close()


def _cause(seat: Seat) -> str:
    """How a process ended, and the last that it printed."""
    code = seat.process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    seat.printed.seek(0)
    lines = seat.printed.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}: {last}" if last else how


def _serve(connection: Connection, held: Sequence[Connection], printed: int, parent: int, threads: int) -> None:
    """A worker's whole life, in its own process. held: the parent's ends of all workers' pipes, which it has inherited;
    printed: where its output goes."""
    for other in held:
        other.close()
    _of_its_own(printed, parent)
    speaking = threading.Lock()

    def say(message: _Answer | _Waits) -> None:
        with speaking:
            connection.send_bytes(_pickled(message))

    from counterweight.workers.storage.outages import OUTAGES

    OUTAGES.listener = lambda text: say(_Waits(text))
    worker = WorkerProcess("cpu", threads)
    say(_answer(partial(worker.ready, None)))
    while True:
        try:
            task, unread = connection.recv()
        except (EOFError, ConnectionResetError):
            return  # the parent has closed the pool
        say(_answer(partial(worker.run, task, unread)))


def _of_its_own(printed: int, parent: int) -> None:
    """Undoes what a fork has of its parent: signals that the parent handles for both, its terminal; and dies with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    call_me(NAME)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _answer(work: Callable[[], object]) -> _Answer:
    try:
        return _Answer(value=work())
    except Exception as error:  # noqa: BLE001 - whatever a task raises is the driver's to judge
        if not isinstance(error, CounterweightError):
            error.add_note(traceback.format_exc())  # a defect: the traceback does not travel
        return _Answer(error=error)


def _pickled(message: _Answer | _Waits) -> bytes:
    """An error that does not travel, as a library's may not, is told in words."""
    if isinstance(message, _Answer) and message.error is not None:
        try:
            pickle.loads(pickle.dumps(message.error))
        except Exception:  # noqa: BLE001 - its own code runs
            message = _Answer(error=WorkerError(f"{type(message.error).__name__}: {message.error}"))
    return pickle.dumps(message)
