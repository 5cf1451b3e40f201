"""The queue as pure data: bounds are never exceeded, order is that of turns, and nobody starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from counterweight.pipeline.jobs.limits import changed
from counterweight.pipeline.jobs.queue import (
    STEP,
    Entrant,
    Limits,
    compressed_beside,
    crowded,
    given_up,
    in_order,
    startable,
)
from counterweight.pipeline.jobs.record import HIGHEST_PRIORITY, BatchPart
from counterweight.pipeline.jobs.states import State
from counterweight.workers.errors import RequestError
from tests.pipeline.jobs.memory import EPOCH

PATIENT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""

BATCHES = (None, BatchPart(id="b", concurrency=1), BatchPart(id="c", concurrency=2, max_failures=1))


def entrant(
    id: str, *, state: State = State.QUEUED, minutes: float = 0, priority: int = 0, tenant: str = "t", batch: int = 0
) -> Entrant:
    return Entrant(
        id=id,
        state=state,
        submitted=EPOCH + timedelta(minutes=minutes),
        priority=priority,
        tenant=tenant,
        batch=BATCHES[batch],
    )


entrants = st.lists(
    st.builds(
        entrant,
        st.uuids().map(str),
        state=st.sampled_from(State),
        minutes=st.integers(0, 10_000),
        priority=st.integers(-HIGHEST_PRIORITY, HIGHEST_PRIORITY),
        tenant=st.sampled_from(["t", "u", "v"]),
        batch=st.integers(0, 2),
    ),
    max_size=20,
    unique_by=lambda one: one.id,
)
bounds = st.none() | st.integers(0, 4)
limits = st.builds(
    Limits, concurrency=bounds, per_tenant=bounds, tenants=st.dictionaries(st.just("u"), st.integers(0, 4))
)


def started(every: Sequence[Entrant], chosen: Sequence[str]) -> list[Entrant]:
    return [replace(one, state=State.RUNNING) if one.id in chosen else one for one in every]


def bounded(every: Sequence[Entrant], allowed: Limits) -> list[tuple[int, int]]:
    """How many are active, and how many may be, for every bound that there is."""
    active = [one for one in every if one.state.active]
    tenants, batches = Counter(one.tenant for one in active), Counter(one.batch.id for one in active if one.batch)
    found: list[tuple[int, int | None]] = [(len(active), allowed.concurrency)]
    found += [(tenants[name], allowed.tenants.get(name, allowed.per_tenant)) for name in ("t", "u", "v")]
    found += [(batches[batch.id], batch.concurrency) for batch in BATCHES if batch is not None]
    return [(count, bound) for count, bound in found if bound is not None]


@PATIENT
@given(entrants, limits)
def test_no_bound_is_exceeded_by_a_start(every: list[Entrant], allowed: Limits) -> None:
    """Where more are active already, because a bound was lowered, no further one starts."""
    before, after = bounded(every, allowed), bounded(started(every, startable(every, allowed)), allowed)
    for (was, bound), (is_, _) in zip(before, after, strict=True):
        assert is_ <= max(was, bound)


@PATIENT
@given(entrants, limits)
def test_only_what_waits_starts_and_what_lost_its_driver_always_does(every: list[Entrant], allowed: Limits) -> None:
    chosen = startable(every, allowed)
    states = {one.id: one.state for one in every}
    assert all(states[id].ready for id in chosen)
    assert {one.id for one in every if one.state is State.LAPSED} <= set(chosen)


@PATIENT
@given(entrants, limits)
def test_nobody_is_passed_over_who_could_start(every: list[Entrant], allowed: Limits) -> None:
    """Whoever is left out is so because of a bound: with those before it, there was no place."""
    chosen = startable(every, allowed)
    for one in in_order(every):
        if one.id in chosen:
            continue
        ahead = [other for other in in_order(every) if other.id in chosen and other.turn < one.turn]
        lapsed = [other.id for other in every if other.state is State.LAPSED]
        running = started(every, [*lapsed, *(other.id for other in ahead), one.id])
        assert any(count > bound for count, bound in bounded(running, allowed))


@PATIENT
@given(entrants)
def test_the_order_is_that_of_turns(every: list[Entrant]) -> None:
    ready = [one for one in in_order(every) if one.state is State.QUEUED]
    for first, second in pairwise(ready):
        ahead = (second.submitted - first.submitted) / STEP
        assert first.priority + ahead >= second.priority


@PATIENT
@given(entrants, limits)
def test_whoever_runs_within_the_bounds_is_not_crowded_and_beyond_them_is(
    every: list[Entrant], allowed: Limits
) -> None:
    for one in every:
        if one.state.active:
            alone = [other for other in every if other.state.active]
            tenant = sum(other.tenant == one.tenant for other in alone)
            batch = sum(other.batch == one.batch for other in alone)
            beyond = [
                (len(alone), allowed.concurrency),
                (tenant, allowed.of_tenant(one.tenant)),
                (batch, one.batch.concurrency if one.batch else None),
            ]
            assert crowded(every, allowed, one.id) == any(b is not None and count > b for count, b in beyond)


@PATIENT
@given(st.integers(1, 3), st.integers(-HIGHEST_PRIORITY, 0), st.data())
def test_nobody_starves_under_an_endless_stream_of_more_important_jobs(
    concurrency: int, priority: int, data: st.DataObject
) -> None:
    """Each hour more jobs of the highest priority come than can be run: the patient one starts nevertheless, at the latest when
    those that come are submitted later than priority is worth."""
    patient = entrant("patient", priority=priority)
    every, allowed = [patient], Limits(concurrency=concurrency)
    latest = HIGHEST_PRIORITY - priority + 5  # three hours may leave one each behind
    for hour in range(latest + 1):
        coming = data.draw(st.integers(concurrency, concurrency + 1)) if hour < 3 else concurrency
        every += [entrant(f"{hour}-{n}", minutes=60 * hour, priority=HIGHEST_PRIORITY) for n in range(coming)]
        chosen = startable(every, allowed)
        assert len(chosen) == concurrency
        if "patient" in chosen:
            return
        every = [one for one in every if one.id not in chosen]  # an hour later they are done
    pytest.fail("it never started")


def test_a_job_over_its_tenants_bound_stands_aside() -> None:
    every = [
        entrant("a", state=State.RUNNING, tenant="busy"),
        entrant("b", minutes=1, tenant="busy", priority=5),
        entrant("c", minutes=2, tenant="other"),
    ]
    assert startable(every, Limits(concurrency=2, per_tenant=1)) == ["c"]
    assert startable(every, Limits(concurrency=3, per_tenant=1, tenants={"busy": 2})) == ["b", "c"]


def test_a_batch_that_failed_too_often_is_given_up() -> None:
    failed = [entrant("a", state=State.FAILED, batch=2)]
    rest = [entrant("c", batch=2), entrant("d", state=State.RUNNING, batch=2), entrant("e")]
    assert given_up([*failed, *rest]) == []
    assert given_up([*failed, entrant("b", state=State.FAILED, batch=2), *rest]) == ["c"]


class TestChanges:
    def test_of_one_bound_leave_the_others(self) -> None:
        limits = changed(Limits(concurrency=3, tenants={"a": 1}), None, 2, ["b=4"])
        assert limits == Limits(concurrency=3, per_tenant=2, tenants={"a": 1, "b": 4})

    def test_may_take_a_bound_away(self) -> None:
        assert changed(Limits(concurrency=3, tenants={"a": 1}), -1, None, ["a=-1"]) == Limits()

    @pytest.mark.parametrize("text", ["a", "a=", "=3", "a=x", "a b=3", "a=-2"])
    def test_that_make_no_sense_are_refused(self, text: str) -> None:
        with pytest.raises(RequestError, match="--tenant"):
            changed(Limits(), None, None, [text])


def of_calibration(id: str, state: State = State.QUEUED, calibration: str | None = "c", minutes: float = 0) -> Entrant:
    part = BatchPart(id="batch", concurrency=9, calibration=calibration)
    return replace(entrant(id, state=state, minutes=minutes), batch=part)


def test_of_jobs_with_one_calibration_one_starts_until_the_first_has_succeeded() -> None:
    every = [of_calibration(id, minutes=place) for place, id in enumerate("abc")]
    others = [of_calibration("d", calibration=None, minutes=9), of_calibration("e", calibration="other", minutes=9)]
    assert startable([*every, *others], Limits()) == ["a", "d", "e"]
    running = [replace(every[0], state=State.RUNNING), *every[1:]]
    assert startable(running, Limits()) == []
    assert crowded([running[0], replace(running[1], state=State.RUNNING)], Limits(), "b")
    failed = [replace(every[0], state=State.FAILED), *every[1:]]
    assert startable(failed, Limits()) == ["b"]
    succeeded = [replace(every[0], state=State.SUCCEEDED), *every[1:]]
    assert startable(succeeded, Limits()) == ["b", "c"]


def test_those_that_wait_are_compressed_beside_the_one_that_runs() -> None:
    states = {"a": State.RUNNING, "b": State.WAITING, "c": State.QUEUED, "d": State.SUCCEEDED, "e": State.RUNNING}
    every = [of_calibration(id, state, minutes=-place) for place, (id, state) in enumerate(states.items())]
    every += [of_calibration("f", calibration="other"), of_calibration("g", calibration=None), entrant("h")]
    assert compressed_beside(every, "a") == ["c", "b"]
    assert compressed_beside(every, "g") == compressed_beside(every, "h") == []
