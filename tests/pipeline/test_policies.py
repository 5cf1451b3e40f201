from __future__ import annotations

import pytest

from counterweight.pipeline.policies import Failure, Placement, RetryPolicy, Verdict, describe
from counterweight.workers.errors import (
    CheckpointError,
    CounterweightError,
    GateError,
    IntegrityError,
    ManifestError,
    ObjectNotFoundError,
    RequestError,
    StorageError,
    UnsupportedModelError,
    WorkerError,
)


@pytest.mark.parametrize("error", [StorageError("x"), IntegrityError("x"), ObjectNotFoundError("x"), WorkerError("x")])
def test_surroundings_are_given_three_tries(error: CounterweightError) -> None:
    policy = RetryPolicy()
    verdicts = [policy.judge(Failure(error, worker_died=False), tries) for tries in (1, 2, 3)]
    assert verdicts == [Verdict.RETRY, Verdict.RETRY, Verdict.FAIL]


def test_the_number_of_tries_is_the_policys() -> None:
    policy = RetryPolicy(attempts=5)
    verdicts = [policy.judge(Failure(StorageError("x"), worker_died=False), tries) for tries in (4, 5)]
    assert verdicts == [Verdict.RETRY, Verdict.FAIL]


@pytest.mark.parametrize("kind", [RequestError, ManifestError, CheckpointError, UnsupportedModelError])
@pytest.mark.parametrize("worker_died", [False, True])
def test_a_wrong_request_is_never_tried_again(kind: type[RequestError], worker_died: bool) -> None:
    assert RetryPolicy().judge(Failure(kind("x"), worker_died), 1) is Verdict.FAIL


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), MemoryError(), GateError("x")])
def test_a_defect_is_not_tried_again(error: BaseException) -> None:
    assert RetryPolicy().judge(Failure(error, worker_died=False), 1) is Verdict.FAIL


def test_a_dead_worker_is_worth_another_try_whatever_the_error() -> None:
    verdicts = [RetryPolicy().judge(Failure(OSError("gone"), worker_died=True), tries) for tries in (1, 2, 3)]
    assert verdicts == [Verdict.RETRY, Verdict.RETRY, Verdict.FAIL]


def test_a_worker_finishes_what_it_holds_then_takes_orphans_then_the_chain() -> None:
    choose = Placement().choose
    held = {4: 1, 2: 1, 3: 0}
    assert choose(1, held, [0], [5]) == 2
    assert choose(0, held, [0], [5]) == 3
    assert choose(2, held, [1, 0], [5]) == 0
    assert choose(2, held, [], [6, 5]) == 5
    assert choose(2, held, [], []) is None


def test_a_description_shows_the_type_of_what_was_not_raised_on_purpose() -> None:
    assert describe(StorageError("read s3://b/k: timed out")) == "read s3://b/k: timed out"
    assert describe(ValueError("bad")) == "ValueError: bad"
