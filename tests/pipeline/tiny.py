"""A job small enough to run in a second, a pool of workers in this process, and a progress that remembers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from counterweight.pipeline.artifact import DOCUMENT, Published
from counterweight.pipeline.artifact.card import CARD
from counterweight.pipeline.events import (
    BlockDone,
    Event,
    EventLog,
    FellBack,
    Note,
    Planned,
    StageEntered,
    Summary,
    TaskRetried,
    TaskStarted,
    WindowsDone,
)
from counterweight.pipeline.forked_pool import NAME as FORK
from counterweight.pipeline.manifest import CompressionJob, load_manifest
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.opening import Opened
from counterweight.pipeline.orchestrator import Orchestrator
from counterweight.pipeline.passing import Given, Kept, References
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.pool import Outcome, WorkerPool
from counterweight.pipeline.progress import Progress
from counterweight.pipeline.tokens import read_tokens
from counterweight.workers.errors import WorkerError
from counterweight.workers.identity import Identity, WorkerReport
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.task import Task
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob
from tests.common_memory import Member, Shard
from tests.models import Case, checkpoint, write_text
from tests.patience import PATIENCE

MANIFEST = """\
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {name: tiny}
spec:
  model: {uri: model}
  calibration: {source: {uri: calibration.txt}, sequences: 12, sequence_length: 32}
  recipe:
    weights: {bits: 4, group_size: 32}
    compensation: {kind: svd, rank: {count: 4}}
  validation: {text: {uri: validation.txt}}
  output: {uri: out}
"""


def write_job(root: Path, *, case: str | Case = "llama", layers: int = 3, manifest: str = MANIFEST) -> Path:
    """A model, two texts and a manifest beside each other; returns the manifest's path."""
    root.mkdir(parents=True, exist_ok=True)
    checkpoint(case, root / "model", torch.bfloat16, num_hidden_layers=layers)
    write_text(root / "calibration.txt", 500)
    write_text(root / "validation.txt", 7 * 32, seed=1)
    path = root / "job.yaml"
    path.write_text(manifest)
    return path


def lengthened(manifest: Path) -> Path:
    """The same, with a text of forty times the length: blocks take long enough to be met half done, over several shards of
    hidden states each."""
    text = manifest.parent / "calibration.txt"
    text.write_text(" ".join([text.read_text()] * 40))
    manifest.write_text(
        manifest.read_text().replace("sequences: 12, sequence_length: 32", "sequences: 512, sequence_length: 32")
    )
    return manifest


def job_of(path: Path, *overrides: str) -> CompressionJob:
    """The job that a manifest describes."""
    return load_manifest(str(path), overrides).job


class Death(Enum):
    """When a worker's process dies: before it did anything, or after its work is committed and before anyone knows."""

    BEFORE = "before"
    AFTER = "after"


Fault = Callable[[int, Task[Any]], BaseException | Death | None]
"""Worker and task -> what goes wrong with it."""


@dataclass(slots=True)
class _Slot:
    member: Member
    thread: ThreadPoolExecutor


class LocalPool:
    """Workers in threads of this process, with the faults that a test asks for."""

    def __init__(self, size: int = 1, *, fault: Fault = lambda *_: None, threads: int = 1) -> None:
        self.size, self.threads = size, threads
        self.room: int | None = None
        self.calls: list[tuple[int, Task[Any]]] = []
        self.restarts: list[int] = []
        self._fault = fault
        self._slots = [self._fresh() for _ in range(size)]
        self._pending: dict[Future[Any], tuple[int, int]] = {}
        self._references: References[Shard] = References()
        self._unread: list[Blob] = []
        self._tickets = 0
        self._idle = list(range(size))

    def _fresh(self) -> _Slot:
        return _Slot(Member(Worker("cpu", self.threads), shares=self.size > 1), ThreadPoolExecutor(1))

    def first(self) -> WorkerReport:
        """What `RayPool` says of the first worker that answered."""
        return WorkerReport(
            device=self._slots[0].member.worker.ready(), identity=Identity(code=""), host="here", pid=os.getpid()
        )

    def idle(self) -> list[int]:
        return list(self._idle)

    def submit(self, worker: int, task: Task[Any]) -> int:
        self._idle.remove(worker)
        self.calls.append((worker, task))
        fault = self._fault(worker, task)
        slot = self._slots[worker]
        given = self._references.given(worker, task)
        future: Future[Any] = slot.thread.submit(_call, slot.member, task, fault, self._unread, given)
        self._unread = []
        self._tickets += 1
        self._pending[future] = (self._tickets, worker)
        return self._tickets

    def wait(self, seconds: float) -> list[Outcome]:
        done, _ = wait(self._pending, timeout=seconds, return_when=FIRST_COMPLETED)
        return [self._outcome(future) for future in sorted(done, key=lambda f: self._pending[f])]

    def _restart(self, worker: int) -> None:
        self.restarts.append(worker)
        self._slots[worker].thread.shutdown()
        self._slots[worker].member.die()
        self._references.lost(worker)
        self._slots[worker] = self._fresh()

    def forget(self, unread: Sequence[Blob]) -> None:
        self._unread += unread
        self._references.forget(unread)

    def close(self) -> None:
        for slot in self._slots:
            slot.thread.shutdown(cancel_futures=True)
            slot.member.worker.close()

    def _outcome(self, future: Future[Any]) -> Outcome:
        ticket, worker = self._pending.pop(future)
        error = future.exception()
        if isinstance(error, _Died):
            self._restart(worker)
        self._idle.append(worker)
        if error is None:
            value, made = future.result()
            self._references.add(worker, made)
            return Outcome(ticket, worker, value=value)
        return Outcome(ticket, worker, error=error, worker_died=isinstance(error, _Died))


class _Died(WorkerError):
    """Stands for the news that a process is gone."""


def _call(
    member: Member, task: Task[Any], fault: BaseException | Death | None, unread: Sequence[Blob], given: Given[Shard]
) -> tuple[Any, Mapping[str, Kept[Shard]]]:
    if isinstance(fault, BaseException):
        raise fault
    if fault is Death.BEFORE:
        raise _Died("worker died: killed by the test")
    found = member.run(task, unread, given)
    if fault is Death.AFTER:
        raise _Died("worker died: killed by the test")
    return found


class Events(Progress):
    """Every event that the display shows as a tuple: its name, then its fields."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.all: list[Event] = []

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The fields of each event of a name."""
        return [event[1:] for event in self.seen if event[0] == name]

    def on(self, event: Event) -> None:
        self.all.append(event)
        match event:
            case StageEntered(stage):
                self.seen.append(("stage", stage))
            case Planned(blocks, reused):
                self.seen.append(("plan", blocks, reused))
            case TaskStarted(block=int(block), worker=worker):
                self.seen.append(("block_started", block, worker))
            case BlockDone(block=block, reused=reused):
                self.seen.append(("block_done", block, reused))
            case WindowsDone(done, total):
                self.seen.append(("windows", done, total))
            case Note(text) | TaskRetried(text=text) | FellBack(text=text):
                self.seen.append(("note", text))
            case Summary(lines):
                self.seen.append(("finish", tuple(lines)))


def run_local(
    job: CompressionJob,
    pool: LocalPool | None = None,
    progress: Progress | None = None,
    resume: Resume = Resume.AUTO,
) -> Published:
    """Runs a job in this process; closes the pool."""
    pool = LocalPool() if pool is None else pool
    try:
        return run_on(pool, job, progress, resume)
    finally:
        pool.close()


def run_on(
    pool: WorkerPool, job: CompressionJob, progress: Progress | None = None, resume: Resume = Resume.AUTO
) -> Published:
    """Runs a job on workers that compute on the CPU."""
    source = open_model(job.spec.model.uri)
    with EventLog(Events() if progress is None else progress) as log:
        opened = Opened(source=source, tokens=read_tokens(job, source.tokenizer()), plan=make_plan(job, source))
        return Orchestrator(job, opened, pool, "cpu", log, resume).run()


def files_of(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes, of an artifact: what follows from its id, without times (report/*, artifact.json)."""
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {
        name: data for name, data in found.items() if not name.startswith("report/") and name not in (DOCUMENT, CARD)
    }


def stored(uri: str) -> dict[str, bytes]:
    """As `files_of`, from any store."""
    store = open_store(uri)
    keys = [info.key for info in store.list()]
    return {key: store.read(key) for key in keys if not key.startswith("report/") and key not in (DOCUMENT, CARD)}


def local_path(uri: str) -> Path:
    """The directory of a file: URI."""
    return Path(uri.removeprefix("file://"))


def until(condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
    """Waits for a condition; a test that waits longer than `seconds` fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def actor_pids(driver: int) -> list[int]:
    """Processes of a driver's workers, in order of their ids: two generations below it where Ray runs them, else its forks."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            name, _, rest = (entry / "stat").read_text().rpartition(")")
            fields = rest.split()
            forked = name.endswith(f"({FORK}")
            names[int(entry.name)] = FORK if forked else (entry / "cmdline").read_text().partition("\0")[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if fields[0] != "Z":
            parents[int(entry.name)] = int(fields[1])
    return sorted(
        pid
        for pid, parent in parents.items()
        if (parents.get(parent) == driver and names[pid].startswith("ray::Worker"))
        or (parent == driver and names[pid] == FORK)
    )


def _notice_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def communicate(self, *, timeout: float | None = None) -> tuple[str, object]: ...


Start = Callable[[Sequence[str], IO[bytes]], Process]


def _started(within: Sequence[str], arguments: Sequence[str], stderr: IO[bytes]) -> Process:
    return subprocess.Popen(
        [*within, sys.executable, "-m", "counterweight.pipeline.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=_notice_interrupts,
    )


class Run:
    """`counterweight run` as a process of its own, in a session of its own, watched through its stderr."""

    def __init__(self, manifest: Path, *arguments: str, within: Sequence[str] = (), start: Start | None = None) -> None:
        """within: what the command begins with, that another one runs it in a place of its own. start: begins it otherwise,
        with the command's arguments and where its stderr goes."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = (start or partial(_started, within))(["run", str(manifest), *arguments], self._log)

    @property
    def stderr(self) -> str:
        """What has been written so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")  # the last character may be half there

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
        """Until a condition holds, which it must before the process ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.poll()}: {self.stderr}"
            assert time.monotonic() < deadline, f"waited for {seconds} s: {self.stderr}"
            time.sleep(0.02)

    def wait_for(self, text: str, *, seconds: float = PATIENCE) -> None:
        """Until stderr holds a text, which it must before the process ends."""
        self.wait_until(lambda: text in self.stderr, seconds=seconds)

    def finish(self, *, seconds: float = PATIENCE) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.wait(), out, self.stderr

    def kill(self) -> list[int]:
        """SIGKILL to the driver and what shares its process group; returns the workers, which outlive it a moment."""
        workers = actor_pids(self.process.pid)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return workers


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memory_of(pid: int, what: str) -> int:
    """Bytes that a process has, `VmSize` or `VmRSS` of proc(5); 0 when it is gone."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)
