"""Drivers at work: what they take, how attempts end, when they try again; attempts are scripts, time is a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from counterweight.pipeline.jobs import facts
from counterweight.pipeline.jobs.attempt import Exit
from counterweight.pipeline.jobs.drive import until_ended, until_idle
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import Ended, Entry, Leased
from counterweight.pipeline.jobs.lease import cancel, take
from counterweight.pipeline.jobs.queue import Limits
from counterweight.pipeline.jobs.record import BatchPart, JobRecord
from counterweight.pipeline.jobs.retries import BUDGETS, JobRetries
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.pipeline.segments import SegmentWriter
from counterweight.workers.errors import StorageError
from tests.pipeline.jobs.memory import record, submitted
from tests.pipeline.jobs.theatre import ANOTHER, OK, Scripted, Theatre


@pytest.fixture
def theatre() -> Theatre:
    return Theatre()


def test_it_drives_all_jobs_one_after_the_other_in_the_order_of_their_turns(theatre: Theatre) -> None:
    (first, second) = submitted(theatre.jobs, "first", "second")
    urgent = record("urgent", priority=3)
    theatre.jobs.submit(urgent)
    theatre.driver().work(until_idle)
    assert [id for id, _ in theatre.attempts] == [urgent.id, *sorted([first, second])]
    assert theatre.states() == [State.SUCCEEDED] * 3
    assert all(attempt.closed for _, attempt in theatre.attempts)
    assert {job.ended.artifact for job in theatre.jobs.all() if job.ended} == {OK.artifact}


def test_a_wrong_request_is_final_and_keeps_its_line(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.ends = [Exit(2, "spec.model.uri: no such directory")]
    theatre.driver().work(until_ended(id))
    said = facts.facts(theatre.jobs.get(id))
    assert (said["state"], said["cause"], said["exit_code"]) == ("failed", "request", 2)
    assert said["line"] == "spec.model.uri: no such directory"
    assert len(theatre.attempts) == 1


def test_failing_surroundings_are_tried_again_later_and_later(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.ends = [ANOTHER, ANOTHER, OK]
    theatre.driver().work(until_ended(id))
    job = theatre.jobs.get(id)
    assert (job.state, job.failures) == (State.SUCCEEDED, {Cause.SURROUNDINGS: 2})
    ended = [dated.at for dated in job.journal if isinstance(dated.entry, Ended)]
    leased = [dated.at for dated in job.journal if isinstance(dated.entry, Leased)]
    waits = [(begun - over).total_seconds() for over, begun in zip(ended, leased[1:], strict=False)]
    assert waits[0] >= 10
    assert waits[1] >= 20


def test_each_cause_has_a_budget_of_its_own(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.ends = [ANOTHER, Exit(-9), ANOTHER, Exit(-9), ANOTHER, ANOTHER]
    theatre.driver().work(until_ended(id))
    job = theatre.jobs.get(id)
    assert (job.state, job.exit_code) == (State.FAILED, 4)
    assert job.failures == {Cause.SURROUNDINGS: BUDGETS[Cause.SURROUNDINGS], Cause.KILLED: BUDGETS[Cause.KILLED]}
    assert job.ended is not None
    assert (job.ended.cause, job.ended.line) == (Cause.SURROUNDINGS, "503 SlowDown")


def test_budgets() -> None:
    retries = JobRetries()
    for cause in (Cause.REQUEST, Cause.GATE, Cause.DEFECT, Cause.CANCELLED):
        assert retries.delay(cause, {}) is None
    assert [retries.delay(Cause.SURROUNDINGS, {Cause.SURROUNDINGS: n}) for n in range(4)] == [10, 20, 40, None]
    assert JobRetries({Cause.SURROUNDINGS: 50}).delay(Cause.SURROUNDINGS, {Cause.SURROUNDINGS: 30}) == 600


def test_a_cancel_stops_the_work_at_the_next_beat(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.looks = 1000
    asked: list[float] = []

    def during() -> None:
        if theatre.attempts and not asked:
            asked.append(theatre.store.time.timestamp())
            cancel(theatre.jobs, id)

    theatre.during = during
    theatre.driver().work(until_ended(id))
    job = theatre.jobs.get(id)
    assert job.state is State.CANCELLED
    assert theatre.attempts[0][1].asked
    assert job.journal[-1].at.timestamp() - asked[0] <= 4


def test_a_cancelled_job_without_a_driver_is_closed_by_any(theatre: Theatre) -> None:
    (id, other) = submitted(theatre.jobs, "tiny", "other")
    assert take(theatre.jobs, id, "dead", seconds=15) is not None
    cancel(theatre.jobs, id)
    assert theatre.jobs.get(id).state is State.CANCELLING
    theatre.store.advance(16)
    theatre.driver().work(until_idle)
    assert theatre.jobs.get(id).state is State.CANCELLED
    assert [id for id, _ in theatre.attempts] == [other]


def test_a_dead_drivers_job_is_taken_over_as_soon_as_its_lease_lapses(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    assert take(theatre.jobs, id, "dead", seconds=15) is not None
    theatre.driver("b").work(until_ended(id))
    job = theatre.jobs.get(id)
    assert job.state is State.SUCCEEDED
    assert 15 < (job.journal[1].at - job.journal[0].at).total_seconds() <= 17


def test_a_dead_drivers_job_goes_before_others_and_needs_no_free_place(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    assert take(theatre.jobs, id, "dead", seconds=15) is not None
    theatre.jobs.submit(record("urgent", priority=100))
    theatre.jobs.set_limits(Limits(concurrency=1))
    theatre.store.advance(16)
    theatre.driver().work(until_idle)
    assert theatre.attempts[0][0] == id


def test_a_job_whose_drivers_die_again_and_again_is_at_its_end(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    for number in range(BUDGETS[Cause.LAPSED] + 1):
        assert take(theatre.jobs, id, f"dead {number}", seconds=15) is not None
        theatre.store.advance(16)
    theatre.driver().work(until_ended(id))
    said = facts.facts(theatre.jobs.get(id))
    assert (said["state"], said["cause"], said["line"]) == ("failed", "lapsed", "6 of its drivers died")
    assert theatre.jobs.get(id).exit_code == 4
    assert theatre.attempts == []


def test_whoever_loses_its_lease_stops_and_writes_nothing(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.looks = 1000
    taken: list[object] = []

    def during() -> None:
        if theatre.attempts and not taken:
            theatre.store.advance(60)  # this process was frozen
            taken.append(take(theatre.jobs, id, "b", seconds=1e9))

    theatre.during = during
    driver = theatre.driver()
    lease = take(driver.jobs, id, "a", seconds=15)
    assert lease is not None
    driver.drive(lease)
    job = theatre.jobs.get(id)
    assert (job.state, job.holder) == (State.RUNNING, "b")
    assert theatre.attempts[0][1].asked
    assert any("somebody else drives it" in note for note in theatre.notes)


def test_a_driver_that_is_asked_to_end_gives_its_job_back_at_once(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.looks = 1000
    interrupts = iter([True])

    def during() -> None:
        if theatre.attempts and next(interrupts, False):
            raise KeyboardInterrupt

    theatre.during = during
    with pytest.raises(KeyboardInterrupt):
        theatre.driver().work(until_ended(id))
    job = theatre.jobs.get(id)
    assert (job.state, job.failures) == (State.QUEUED, {Cause.RELEASED: 1})
    assert theatre.attempts[0][1].closed
    theatre.looks, theatre.during = 1, lambda: None
    theatre.driver("b").work(until_ended(id))
    assert theatre.jobs.get(id).state is State.SUCCEEDED


def test_a_store_that_is_away_for_a_while_loses_nothing(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the requests two thirds fail, those for a beat and those for the end too."""
    (id,) = submitted(theatre.jobs, "tiny")
    theatre.looks = 5
    requests: list[str] = []

    def failing(name: str) -> None:
        real = getattr(theatre.store, name)

        def call(*arguments: object) -> object:
            requests.append(name)
            if len(requests) % 3:
                raise StorageError("503 SlowDown")
            return real(*arguments)

        monkeypatch.setattr(theatre.store, name, call)

    for name in ("create", "write"):
        failing(name)
    theatre.driver().work(until_ended(id))
    assert theatre.jobs.get(id).state is State.SUCCEEDED
    assert len(theatre.attempts) == 1
    assert any("no beat: 503 SlowDown" in note for note in theatre.notes)


def test_an_attempt_that_cannot_be_started_is_a_failure_of_the_surroundings(theatre: Theatre) -> None:
    (id,) = submitted(theatre.jobs, "tiny")

    def start(record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter) -> Scripted:
        raise OSError(28, "No space left on device")

    driver = theatre.driver()
    driver.start = start
    driver.work(until_ended(id))
    job = theatre.jobs.get(id)
    assert job.ended is not None
    assert (job.state, job.ended.cause) == (State.FAILED, Cause.SURROUNDINGS)
    assert "No space left" in job.ended.line


def test_a_batch_of_which_too_many_fail_is_given_up(theatre: Theatre) -> None:
    batch = BatchPart(id="nightly", max_failures=1)
    for name in "abcd":
        theatre.jobs.submit(record(name, batch=batch))
    theatre.ends = [Exit(3, "gate"), Exit(3, "gate"), OK]
    theatre.driver().work(until_idle)
    assert sorted(state.value for state in theatre.states()) == ["cancelled", "cancelled", "failed", "failed"]


def test_whoever_finds_more_running_than_may_gives_its_job_back_before_it_starts(
    theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look and its lease another driver took the only place for another job."""
    first, second = submitted(theatre.jobs, "first", "second")
    theatre.jobs.set_limits(Limits(concurrency=1))
    driver = theatre.driver()
    append, taken = driver.jobs.append, list[object]()

    def late(id: str, entry: Entry, allowed: Callable[[Job], bool]) -> int | None:
        if not taken:
            taken.append(take(theatre.jobs, second if id == first else first, "b", seconds=1e9))
        return append(id, entry, allowed)

    monkeypatch.setattr(driver.jobs, "append", late)
    driver.work(lambda jobs: bool(theatre.attempts) or any(Cause.RELEASED in job.failures for job in jobs))
    assert theatre.attempts == []
    assert sorted(state.value for state in theatre.states()) == ["queued", "running"]


def test_a_run_is_told_of_the_jobs_that_share_its_calibration(theatre: Theatre) -> None:
    part = BatchPart(id="b", concurrency=3, calibration="c")
    alone = record("alone", priority=9, batch=BatchPart(id="b", concurrency=3))
    every = [record(name, batch=part, priority=-place) for place, name in enumerate(["first", "second", "third"])]
    for one in (alone, *every):
        theatre.jobs.submit(one)
    theatre.driver().work(until_idle)
    first, second, third = (one.id for one in every)
    assert theatre.beside == {alone.id: [], first: [second, third], second: [third], third: []}
