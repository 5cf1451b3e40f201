"""A job's life in its journal: leases, beats, take-overs, ends, cancels; on a store in memory with a clock of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import Standing, cancel, close, take
from counterweight.pipeline.jobs.states import Cause, State, cause_of
from counterweight.pipeline.jobs.store import JobStore
from counterweight.workers.errors import IntegrityError, RequestError, StorageError
from tests.pipeline.jobs.memory import MemoryStore, record, submitted

DONE = Ended(cause=Cause.DONE, exit_code=0, artifact="file:///out/tiny/1")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def jobs(store: MemoryStore) -> JobStore:
    return JobStore(store)


@pytest.fixture
def id(jobs: JobStore) -> str:
    (one,) = submitted(jobs, "tiny")
    return one


def test_a_job_is_submitted_once(jobs: JobStore, id: str) -> None:
    assert not jobs.submit(record("tiny", priority=7))
    assert jobs.get(id).record.priority == 0


def test_a_job_is_queued_then_running_then_at_its_end(jobs: JobStore, id: str) -> None:
    assert jobs.get(id).state is State.QUEUED
    lease = take(jobs, id, "a")
    assert lease is not None
    assert (jobs.get(id).state, jobs.get(id).holder, jobs.get(id).live) == (State.RUNNING, "a", True)
    assert lease.end(DONE)
    job = jobs.get(id)
    assert (job.state, job.ended, job.holder) == (State.SUCCEEDED, DONE, None)


def test_of_many_who_want_a_lease_one_has_it(jobs: JobStore, id: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda name: take(JobStore(jobs.store), id, str(name)), range(24)))
    assert sum(lease is not None for lease in got) == 1
    assert len(jobs.get(id).journal) == 1


def test_a_lease_that_is_renewed_does_not_lapse_and_one_that_is_not_does(
    store: MemoryStore, jobs: JobStore, id: str
) -> None:
    lease = take(jobs, id, "a", seconds=15)
    assert lease is not None
    for _ in range(10):
        store.advance(10)
        assert lease.beat() is Standing.HELD
        assert take(jobs, id, "b") is None
    store.advance(15)
    assert jobs.get(id).state is State.RUNNING
    store.advance(0.001)
    assert jobs.get(id).state is State.LAPSED


def test_whoever_was_taken_over_is_told_and_can_write_nothing(store: MemoryStore, jobs: JobStore, id: str) -> None:
    first = take(jobs, id, "a", seconds=15)
    store.advance(16)
    second = take(jobs, id, "b", seconds=15)
    assert first is not None
    assert second is not None
    assert first.beat() is Standing.LOST
    assert not first.end(Ended(cause=Cause.REQUEST, exit_code=2))
    assert second.beat() is Standing.HELD
    assert jobs.get(id).failures == {Cause.LAPSED: 1}
    assert second.end(DONE)
    assert jobs.get(id).state is State.SUCCEEDED
    assert first.beat() is Standing.LOST


def test_a_holder_that_was_late_and_was_not_taken_over_goes_on(store: MemoryStore, jobs: JobStore, id: str) -> None:
    lease = take(jobs, id, "a", seconds=15)
    assert lease is not None
    store.advance(100)
    assert lease.beat() is Standing.HELD
    assert jobs.get(id).state is State.RUNNING


def test_an_end_and_a_take_over_at_once_have_one_winner(store: MemoryStore, jobs: JobStore, id: str) -> None:
    """Whatever the order: an end that everybody has seen is never taken back."""
    lease = take(jobs, id, "a", seconds=15)
    assert lease is not None
    store.advance(16)
    with ThreadPoolExecutor(2) as threads:
        ended, taken = threads.submit(lease.end, DONE), threads.submit(take, JobStore(store), id, "b")
        assert ended.result() != (taken.result() is not None)


def test_a_try_that_is_repeated_waits_for_its_time(store: MemoryStore, jobs: JobStore, id: str) -> None:
    lease = take(jobs, id, "a")
    assert lease is not None
    assert lease.end(Ended(cause=Cause.SURROUNDINGS, again=True, delay=30, exit_code=4, line="503 SlowDown"))
    assert jobs.get(id).state is State.WAITING
    assert take(jobs, id, "b") is None
    store.advance(30)
    assert jobs.get(id).state is State.QUEUED
    assert take(jobs, id, "b") is not None
    assert jobs.get(id).failures == {Cause.SURROUNDINGS: 1}


class TestCancel:
    def test_of_a_job_that_nobody_drives_is_its_end(self, jobs: JobStore, id: str) -> None:
        assert cancel(jobs, id).state is State.CANCELLED
        assert take(jobs, id, "a") is None

    def test_of_a_running_job_is_told_at_the_next_beat(self, jobs: JobStore, id: str) -> None:
        lease = take(jobs, id, "a")
        assert lease is not None
        assert cancel(jobs, id).state is State.CANCELLING
        assert cancel(jobs, id).state is State.CANCELLING
        assert lease.beat() is Standing.CANCELLED
        assert lease.end(Ended(cause=Cause.CANCELLED))
        assert jobs.get(id).state is State.CANCELLED
        assert [dated.entry.kind for dated in jobs.get(id).journal] == ["leased", "cancel", "ended"]

    def test_of_a_job_whose_driver_died_needs_nobody(self, store: MemoryStore, jobs: JobStore, id: str) -> None:
        assert take(jobs, id, "a", seconds=15) is not None
        assert cancel(jobs, id).state is State.CANCELLING
        close(jobs, id)
        assert jobs.get(id).state is State.CANCELLING  # its driver may still live
        store.advance(16)
        assert jobs.get(id).abandoned
        assert take(jobs, id, "b") is None
        assert cancel(jobs, id).state is State.CANCELLED

    def test_of_a_job_at_its_end_changes_nothing(self, jobs: JobStore, id: str) -> None:
        lease = take(jobs, id, "a")
        assert lease is not None
        lease.end(DONE)
        assert cancel(jobs, id).state is State.SUCCEEDED
        assert len(jobs.get(id).journal) == 2

    def test_of_a_job_that_finishes_meanwhile_does_not_take_its_success(self, jobs: JobStore, id: str) -> None:
        lease = take(jobs, id, "a")
        assert lease is not None
        cancel(jobs, id)
        assert lease.end(DONE)
        assert jobs.get(id).state is State.SUCCEEDED


def test_an_answer_that_was_lost_makes_no_second_entry(
    store: MemoryStore, jobs: JobStore, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store created the entry and says that the key was taken, as it does when a request is repeated."""
    real = store.create
    monkeypatch.setattr(store, "create", lambda key, data: real(key, data) and False)
    assert take(jobs, id, "a") is not None
    assert len(jobs.get(id).journal) == 1


def test_a_job_that_is_not_there(jobs: JobStore) -> None:
    with pytest.raises(RequestError, match="no such job"):
        jobs.get("0" * 16)
    with pytest.raises(RequestError, match="expected 16 hex digits"):
        jobs.get("../../etc")


@pytest.mark.parametrize("where", ["job.json", "journal/0001.json"])
def test_a_damaged_record_is_named(store: MemoryStore, jobs: JobStore, id: str, where: str) -> None:
    assert take(jobs, id, "a") is not None
    store.write(f"_jobs/{id}/{where}", b'{"kind": "leased"}')
    with pytest.raises(IntegrityError, match=where):
        JobStore(store).get(id)


def test_a_store_that_fails_is_an_error_of_the_surroundings(
    store: MemoryStore, jobs: JobStore, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageError("503 SlowDown")

    monkeypatch.setattr(store, "create", away)
    with pytest.raises(StorageError):
        take(jobs, id, "a")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (0, Cause.DONE),
        (2, Cause.REQUEST),
        (3, Cause.GATE),
        (4, Cause.SURROUNDINGS),
        (70, Cause.DEFECT),
        (1, Cause.DEFECT),
        (-9, Cause.KILLED),
        (137, Cause.KILLED),
    ],
)
def test_exit_codes_are_causes(code: int, cause: Cause) -> None:
    assert cause_of(code) is cause


def test_states_are_consistent() -> None:
    for state in State:
        assert not (state.terminal and (state.active or state.ready)), state
    assert all(cause.ends.terminal for cause in Cause)
    assert {cause.ends for cause in Cause} == {state for state in State if state.terminal} - {State.DELETED}
