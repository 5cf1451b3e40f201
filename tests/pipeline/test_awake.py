"""A clock that stands still while its process is stopped."""

from __future__ import annotations

from counterweight.pipeline.awake import AWAKE_SECONDS, Awake


def test_steps_count_up_to_a_bound() -> None:
    now = [1000.0]
    awake = Awake(lambda: now[0])
    assert awake() == 0
    for step, seconds in ((3.0, 3.0), (0.0, 3.0), (AWAKE_SECONDS, 3 + AWAKE_SECONDS), (1e6, 3 + 2 * AWAKE_SECONDS)):
        now[0] += step
        assert awake() == seconds
