"""Events of a job: who is told, what the store holds of them, and that storing them never harms the job."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline import event_store, events, segments
from counterweight.pipeline.event_store import EventStore, line_of
from counterweight.pipeline.events import (
    Event,
    EventLog,
    JobAdmitted,
    JobFailed,
    Note,
    StageEntered,
    TaskRetried,
    TaskStarted,
)
from counterweight.pipeline.redaction import redacted
from counterweight.workers.errors import GateError, StorageError
from counterweight.workers.storage import open_store
from counterweight.workers.storage.file import FileStore
from tests.inprocess import RecordedProgress, run_job
from tests.models import checkpoint
from tests.patience import PATIENCE
from tests.pipeline.tiny import until

RECIPE = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}}}


ADMITTED = JobAdmitted("0" * 16)


class Told:
    """A reader that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = 0

    def on(self, event: Event) -> None:
        self.events.append(event)

    def end(self) -> None:
        self.ended += 1


def kinds() -> list[type[Event]]:
    found = [value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event)]
    return [kind for kind in found if kind is not Event]


def stored(root: Path) -> list[list[dict[str, Any]]]:
    """The events of each run of the only job, in the order of the runs' names."""
    runs = sorted(root.glob("_work/events/*/*"))
    assert len({run.parent for run in runs}) <= 1
    # Another file is one that is being written, and may be gone by now.
    return [[json.loads(line) for path in sorted(run.glob("*.jsonl")) for line in path.open()] for run in runs]


def last_kinds(root: Path) -> list[str]:
    """Of the last event of each run."""
    return [run[-1]["kind"] for run in stored(root) if run]


def behind(runs: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Of each run of `opened`, what followed its first event."""
    assert all(run[0]["kind"] == "job_admitted" for run in runs)
    return [run[1:] for run in runs]


def patient(root: Path, notes: list[str] | None = None, seconds: float = 5.0, patience: float = PATIENCE) -> EventStore:
    """A store of events that has at its end the time that it needs."""
    told = ([] if notes is None else notes).append
    return EventStore(open_store(root.as_uri()), "job", told, seconds=seconds, patience=patience)


def opened(root: Path, notes: list[str] | None = None, **options: float) -> EventStore:
    """One of a job that has been admitted."""
    store = patient(root, notes, **options)
    store.on(ADMITTED)
    return store


def test_kinds_are_told_apart() -> None:
    assert len(kinds()) == len({kind.kind for kind in kinds()}) > 10


def test_every_reader_is_told_everything_in_order_and_of_the_end() -> None:
    first, second = Told(), Told()
    with EventLog(first) as log:
        log.note("one")
        log.add(second)
        log.emit(StageEntered("blocks"))
    assert first.events == [Note("one"), StageEntered("blocks")]
    assert second.events == [StageEntered("blocks")]
    assert first.ended == second.ended == 1


def test_what_ends_a_job_is_its_last_event() -> None:
    told = Told()

    def job() -> None:
        with EventLog(told) as log:
            log.note("one")
            raise GateError("kl: too much")

    with pytest.raises(GateError):
        job()
    assert told.events == [Note("one"), JobFailed("GateError", "kl: too much", refused=False)]
    assert told.ended == 1


class TestStore:
    def test_a_line_holds_kind_time_and_fields(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        before = events.time.time()
        store.on(TaskStarted("block 1 (forward)", "forward", 3, 1))
        store.end()
        ((line,),) = behind(stored(tmp_path))
        assert before <= line.pop("time") <= events.time.time()
        assert line == {
            "kind": "task_started",
            "task": "block 1 (forward)",
            "task_kind": "forward",
            "worker": 3,
            "block": 1,
        }

    def test_a_stage_is_visible_before_the_job_ends(self, tmp_path: Path) -> None:
        store = opened(tmp_path, seconds=PATIENCE)
        store.on(Note("one"))
        store.on(StageEntered("blocks"))
        until(lambda: [len(run) for run in stored(tmp_path)] == [3])
        store.end()

    def test_other_events_are_visible_within_the_interval(self, tmp_path: Path) -> None:
        store = opened(tmp_path, seconds=0.01)
        store.on(Note("one"))
        until(lambda: [len(run) for run in stored(tmp_path)] == [2])
        store.end()

    def test_segments_are_full_before_the_next_begins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(segments, "SEGMENT_BYTES", 400)
        store = opened(tmp_path)
        for number in range(40):
            store.on(Note(f"number {number:03}"))
        store.end()
        files = sorted(tmp_path.rglob("*.jsonl"))
        assert [path.name for path in files] == [f"{number + 1:05}.jsonl" for number in range(len(files))]
        assert all(200 < path.stat().st_size <= 400 for path in files[:-1])
        assert [line["text"] for line in behind(stored(tmp_path))[0]] == [f"number {number:03}" for number in range(40)]

    def test_objects_are_bounded_and_the_end_is_told_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(segments, "SEGMENT_BYTES", 400)
        monkeypatch.setattr(segments, "MAX_SEGMENTS", 3)
        store = opened(tmp_path)
        for number in range(1000):
            store.on(Note(f"number {number:03}"))
        store.on(JobFailed("GateError", "kl", refused=False))
        store.end()
        assert len(list(tmp_path.rglob("*.jsonl"))) == 3
        lines = stored(tmp_path)[0]
        assert lines[-1]["kind"] == "job_failed"
        assert 10 < len(lines) < 30

    @pytest.mark.parametrize(("refused", "kinds"), [(True, []), (False, ["note", "job_failed"])])
    def test_a_request_that_is_refused_leaves_nothing(self, tmp_path: Path, refused: bool, kinds: list[str]) -> None:
        store = patient(tmp_path, seconds=0.01)
        store.on(Note("before"))
        store.on(JobFailed("SomeError", "text", refused=refused))
        store.end()
        assert [line["kind"] for run in stored(tmp_path) for line in run] == kinds

    def test_what_came_before_a_job_was_admitted_is_told_with_it(self, tmp_path: Path) -> None:
        store = patient(tmp_path)
        store.on(Note("before"))
        store.on(ADMITTED)
        store.end()
        assert [line["kind"] for line in stored(tmp_path)[0]] == ["note", "job_admitted"]

    def test_two_runs_of_a_job_do_not_meet(self, tmp_path: Path) -> None:
        both = [opened(tmp_path) for _ in range(2)]
        for number, store in enumerate(both):
            store.on(Note(str(number)))
            store.end()
        assert sorted(run[0]["text"] for run in behind(stored(tmp_path))) == ["0", "1"]

    def test_a_store_that_fails_is_noted_once_and_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, fails, tried = FileStore.write, [True], threading.Event()

        def write(store: FileStore, key: str, data: bytes | bytearray | memoryview) -> None:
            if fails[0]:
                tried.set()
                raise StorageError("write https://me:secret@host/k: 503 SlowDown")
            real(store, key, data)

        monkeypatch.setattr(FileStore, "write", write)
        notes: list[str] = []
        store = opened(tmp_path, notes, seconds=0.01)
        store.on(Note("one"))
        assert tried.wait(PATIENCE)
        until(lambda: store._segments._problem is not None)
        for number in range(5):
            store.on(Note(str(number)))
        assert notes == ["events of the job could not be stored: write https://***@host/k: 503 SlowDown"]
        fails[0] = False
        store.end()
        assert [line["text"] for line in behind(stored(tmp_path))[0]] == ["one", "0", "1", "2", "3", "4"]
        assert len(notes) == 1

    def test_a_store_that_does_not_answer_holds_nothing_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = threading.Event()
        monkeypatch.setattr(FileStore, "write", lambda *_: answer.wait(PATIENCE))
        notes: list[str] = []
        store = opened(tmp_path, notes, seconds=0.01, patience=0.1)
        for _ in range(100):
            store.on(StageEntered("blocks"))
        store.end()
        assert notes == ["events of the job could not be stored: the store took longer than 0.1 s"]
        answer.set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("read s3://key:secret@bucket/a: gone", "read s3://***@bucket/a: gone"),
        ("https://h/a?X-Amz-Signature=ab12&x=1", "https://h/a?X-Amz-Signature=***&x=1"),
        ("https://h/a?x=1&access_token=ab12", "https://h/a?x=1&access_token=***"),
        ("401 for hf_abcdefgh12345", "401 for hf_***"),
        ("AKIAIOSFODNN7EXAMPLE was refused", "*** was refused"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("tokens: 3 of 4; spec.key=5", "tokens: 3 of 4; spec.key=5"),
    ],
)
def test_credentials_do_not_reach_the_store(text: str, expected: str) -> None:
    assert redacted(text) == expected
    retried = TaskRetried("block 1", 0, 1, 3, text, worker_died=False)
    assert json.loads(line_of(retried))["cause"] == expected


def test_a_whole_job_leaves_its_events(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    published = run_job(tmp_path / "model", tmp_path, RECIPE, validation={})
    # A job waits some seconds for its events to be stored, and no longer.
    until(lambda: last_kinds(tmp_path / "artifacts") == ["artifact_published"])
    (lines,) = stored(tmp_path / "artifacts")
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert lines[0]["kind"] == "job_started"
    assert lines[0]["id"] == next((tmp_path / "artifacts" / "_work" / "events").iterdir()).name
    assert lines[-1] == {**lines[-1], "kind": "artifact_published", "uri": published.uri, "existing": False}
    stages = [line["stage"] for line in lines if line["kind"] == "stage_entered"]
    assert stages == ["inventory", "blocks", "assemble", "validate", "publish"]
    done = [line["block"] for line in lines if line["kind"] == "block_done"]
    assert done == [0, 1]
    started, finished = (
        [line["task"] for line in lines if line["kind"] == f"task_{what}"] for what in ("started", "finished")
    )
    assert sorted(started) == sorted(finished)
    assert {"architecture", "embedding", "block 0 (forward)", "block 0 (block)"} <= set(started)


def test_a_job_that_runs_again_is_the_same_job_and_says_so_when_it_fails(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    for _ in range(2):
        with pytest.raises(GateError):
            run_job(tmp_path / "model", tmp_path, RECIPE, validation={"gates": {"kl": 1e-9}})
    until(lambda: last_kinds(tmp_path / "artifacts") == ["job_failed"] * 2)
    runs = stored(tmp_path / "artifacts")
    for lines in runs:
        assert lines[-1]["error"] == "GateError"


def test_a_job_whose_events_cannot_be_stored_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FileStore.write

    def write(store: FileStore, key: str, data: bytes | bytearray | memoryview) -> None:
        if key.startswith(event_store.EVENTS):
            raise StorageError("disk full")
        real(store, key, data)

    monkeypatch.setattr(FileStore, "write", write)
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    progress = RecordedProgress()
    assert run_job(tmp_path / "model", tmp_path, RECIPE, progress=progress).document.id
    assert progress.notes == ["events of the job could not be stored: disk full"]


def test_importing_events_is_cheap() -> None:
    program = "import sys, counterweight.pipeline.events; print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"
